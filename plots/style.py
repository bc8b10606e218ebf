"""How everything looks: page widths, type, colours, names, and the order of the initialisations."""

import re
from collections.abc import Iterable

COLUMN, PAGE = 3.5, 7.16  # inches: one and two columns of an IEEE page
PAPER_IMAGES, PAPER_EPOCHS = 175_381, 500  # of the paper's pretraining (section IV-A4)
METHODS = ["barlow", "moco", "simclr", "simsiam"]
NOT_PRETRAINED = ["random", "channels", "imagenet"]  # what transfer.py's --init knows by name

# Labels of a ratio in results.csv by its unit: the axis, one value in words, the column of a table.
SHARE, PER_CLASS = "%", "/class"
AXES = {
    SHARE: "train ratio (% of the training images, log scale)",
    PER_CLASS: "training images of each class (log scale)",
}
AMOUNTS = {SHARE: "train ratio {:g} %", PER_CLASS: "{:g} images a class"}
TITLES = {SHARE: "Ratio (%)", PER_CLASS: "Images a class"}
AXIS_NAMES = {SHARE: "train ratio", PER_CLASS: "images a class"}
# Rows of a comparison that average ratios: all of them, or those of the paper's tables, which lack 1 %.
MEAN, PAPER_MEAN = "mean", "mean without 1 %"

NAMES = {
    "random": "Random",
    "channels": "Channel statistics",
    "imagenet": "ImageNet-1k",
    "barlow": "Barlow Twins",
    "moco": "MoCo v2",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "linear": "linear probing",
    "finetune": "fine-tuning",
    "rmse": "RMSE",
    "rmse_pooled": "Pooled RMSE",
    "f1": "F1",
    "f1_micro": "Micro F1",
    "f1_macro": "Macro F1",
    "f1_weighted": "Weighted F1",
    "accuracy": "Accuracy",
    "knn5_accuracy": "5-NN accuracy",
    "knn_macro_f1": "k-NN macro F1",
}

RC = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "figure.labelsize": 7,
    "figure.titlesize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a dollar sign in the name of a class is a dollar sign
}

# Colour (Okabe and Ito's, with a grey), marker, dashes, hatch: told apart in grey by the last three.
STYLES = {
    "random": ("#8c8c8c", "s", ":", "xxxxx"),
    "channels": ("#000000", "*", (0, (6, 2)), "++++"),
    "imagenet": ("#e69f00", "^", "--", "////"),
    "barlow": ("#0072b2", "o", "-", ""),
    "moco": ("#009e73", "D", "-.", "\\\\\\\\"),
    "simclr": ("#cc79a7", "v", (0, (5, 1)), "...."),
    "simsiam": ("#56b4e9", "P", (0, (1, 1)), "----"),
}
SPARE = [
    ("#d55e00", "X", (0, (3, 1, 1, 1)), "||||"),
    ("#332288", "p", (0, (6, 2)), "++"),
    ("#882255", "<", (0, (2, 2)), "oooo"),
    ("#117733", ">", (0, (4, 1, 1, 1, 1, 1)), ".."),
]
LINES = {"linear": {"ls": "--", "mfc": "white"}, "finetune": {"ls": "-"}}
CHANCE = {"color": "0.2", "lw": 0.8, "ls": (0, (1, 2))}

# Columns of log.csv as a reader names them, with the direction or the unit.
LOG_LABELS = {
    "loss": "loss, lower is better",
    "knn_macro_f1": "k-NN macro F1, higher is better",
    "effective_rank": "effective rank, higher is better",
    "images_per_s": "images/s, higher is faster",
}


def name_of(key: str) -> str:
    """What a reader calls an initialisation, a mode or a metric; other names stay as they are."""
    return NAMES.get(key, key)


def stem_of(text: str) -> str:
    """`text` as a file name on any system."""
    return re.sub(r"[^\w.-]+", "_", text)


def ordered(inits: Iterable[str]) -> list[str]:
    """Each name once: what is not pretrained here, the four methods, then the others by name."""
    first = [*NOT_PRETRAINED, *METHODS]

    def place(init: str) -> tuple[int, str]:
        return first.index(init) if init in first else len(first), init

    return sorted(dict.fromkeys(inits), key=place)


def ordered_modes(modes: Iterable[str]) -> list[str]:
    """Each mode once, linear probing before fine-tuning, as in the paper."""
    return sorted(set(modes), key=lambda mode: (mode == "finetune", mode))


def spare_style(number: int) -> tuple:
    """A style of the spare ones; where they come again, each colour has another's marker."""
    colour, _, dashes, hatch = SPARE[number % len(SPARE)]
    marker = SPARE[(number + number // len(SPARE)) % len(SPARE)][1]
    return colour, marker, dashes, hatch


def styles_of(inits: list[str], configs: dict[str, dict]) -> dict[str, tuple]:
    """One style per initialisation, used in every figure; a run gets its method's while that is free."""
    styles = {init: STYLES[init] for init in inits if init in STYLES}
    spare = 0
    for init in inits:
        if init in styles:
            continue
        own = STYLES.get(configs.get(init, {}).get("method"))
        if own is None or own in styles.values():
            own = spare_style(spare)
            spare += 1
        styles[init] = own
    return styles
