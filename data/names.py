"""Names: which folder is a split, which is a class, and what the paper calls it (Table II)."""

import re
import unicodedata
from functools import lru_cache

from common import harmless

SPLITS = {  # what people call a split -> split
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
FILLERS = {
    "set",
    "data",
    "dataset",
    "split",
    "images",
    "image",
    "imgs",
    "img",
    "jpg",
    "jpeg",
    "jpegimages",
    "rgb",
}
MASKS = {  # what people call pictures that hold classes of pixels
    "mask",
    "masks",
    "msk",
    "label",
    "labels",
    "gt",
    "gts",
    "groundtruth",
    "annotation",
    "annotations",
    "seg",
    "segmentation",
    "segmentationclass",
    "segmentationobject",
    "instance",
}
SMALL = {  # and copies that are made to be looked at
    "thumb",
    "thumbs",
    "thumbnail",
    "thumbnails",
    "quicklook",
    "quicklooks",
    "preview",
    "previews",
}
MASK_FOLDERS = {"map", "maps", "ann_dir"}  # by their whole name: maps are those of roads and buildings
SYSTEM = {
    "__macosx",
    "@eadir",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
}

PURE_NAMES = {  # Sentinel2GlobalLULC: short name of the archive's folders -> the paper's name
    "BarrenLands": "Barren Lands",
    "MossAndLichen": "Moss and Lichen Lands",
    "Grasslands": "Grasslands",
    "ShrublandOpen": "Open Shrublands",
    "SrublandClose": "Close Shrublands",
    "ForestsOpDeBr": "Open Deciduous Broadleaf Forests",
    "ForestsClDeBr": "Close Deciduous Broadleaf Forests",
    "ForestsDeDeBr": "Dense Deciduous Broadleaf Forests",
    "ForestsOpDeNe": "Open Deciduous Needleleaf Forests",
    "ForestsClDeNe": "Close Deciduous Needleleaf Forests",
    "ForestsDeDeNe": "Dense Deciduous Needleleaf Forests",
    "ForestsOpEvBr": "Open Evergreen Broadleaf Forests",
    "ForestsClEvBr": "Close Evergreen Broadleaf Forests",
    "ForestsDeEvBr": "Dense Evergreen Broadleaf Forests",
    "ForestsOpEvNe": "Open Evergreen Needleleaf Forests",
    "ForestsClEvNe": "Close Evergreen Needleleaf Forests",
    "ForestsDeEvNe": "Dense Evergreen Needleleaf Forests",
    "WetlandMangro": "Mangrove Wetlands",
    "WetlandSwamps": "Swamp Wetlands",
    "WetlandMarshl": "Marshland Wetlands",
    "WaterBodyMari": "Marine Water Bodies",
    "WaterBodyCont": "Continental Water Bodies",
    "PermanentSnow": "Permanent Snow",
    "CropSeasWater": "Croplands Flooded with Seasonal Water",
    "CropCereaIrri": "Irrigated Cereal Croplands",
    "CropCereaRain": "Rainfed Cereal Croplands",
    "CropBroadIrri": "Irrigated Broadleaf Croplands",
    "CropBroadRain": "Rainfed Broadleaf Croplands",
    "UrbanBlUpArea": "Urban and Built-up Areas",
}
LAND_NAMES = {  # Land-1.0: column of the CSVs (as the built-in scenes write them) -> the paper's name
    "Artificial": "Artificial",
    "AnnualCroplands": "Annual Croplands",
    "Greenhouses": "Greenhouses",
    "WoodyCroplands": "Woody Croplands",
    "CropsAndNatural": "Combinations of Croplands and Natural Vegetation",
    "Grasslands": "Grasslands and Grasslands with Trees",
    "Shrublands": "Shrubland and Shrublands with Trees",
    "Forests": "Forests",
    "Barelands": "Barelands",
    "Wetlands": "Wetlands",
}
_PURE = {spelled.casefold(): name for short, name in PURE_NAMES.items() for spelled in (short, name)}
_PURE["shrublandclose"] = "Close Shrublands"  # the archive itself says Srubland
_ARCHIVE = re.compile(r"0*\d+_([a-z]+?)_*(?:_(?:jpe?g|geotiff|tiff?|csv|rgb))?", re.IGNORECASE)
_NUMBERED = re.compile(r"\d+[_\-. ]+[^\W\d]")


def is_hidden(name: str) -> bool:
    """Whether an entry of a folder belongs to the system or to a tool: `.x`, `._x`, `__MACOSX`, `@eaDir`,
    …"""
    return name.startswith(".") or name.casefold() in SYSTEM


def is_filler(name: str) -> bool:
    """Whether a folder's name says no more than that images lie in it: `images`, `JPEGImages`, `rgb_data`."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    return bool(words) and FILLERS.issuperset(words)


@lru_cache(maxsize=1024)
def around_mask(name: str) -> tuple[str, str] | None:
    """What stands before and after the word that calls a folder or a file's stem a mask or a small copy:
    `12` and nothing of `12_mask`, nothing and `png` of `labels_png`; None where no word does."""
    name = re.sub(r"(?<=ground)[\W_](?=truth)", "", name, flags=re.IGNORECASE)
    for word in re.finditer(r"[^\W\d_]+", name.casefold()):
        if word[0] in MASKS | SMALL:
            return name[: word.start()].rstrip("_-. "), name[word.end() :].lstrip("_-. ")
    return None


def holds_masks(folder: str) -> bool:
    """Whether a folder is named as those of masks or of small copies are."""
    return folder.casefold() in MASK_FOLDERS or around_mask(folder) is not None


def split_name(name: str) -> str | None:
    """The split that a folder or file is named after, in any case: `Validation`, `train_set`, `02-test`; or
    None."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    words = [word if word in SPLITS else word.removesuffix("set") for word in words]
    words = [word for word in words if word and word not in FILLERS]
    return SPLITS.get(words[0]) if len(words) == 1 else None


def is_numbered(name: str) -> bool:
    """Whether a folder is named as the archives number their classes: `1_BarrenLands___jpeg`, `02 Fields`."""
    return bool(_NUMBERED.match(name))


def some_of(names: list[str], most: int = 5) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def class_order(name: str) -> tuple:
    """Sort key: by the leading number where there is one (`10_…` after `9_…`), then by name."""
    number = re.match(r"[0-9]+", name)
    return (0, int(number[0]), name) if number else (1, 0, name)


def paper_name(folder: str) -> str | None:
    """The paper's name of a class folder of Sentinel2GlobalLULC, zero-padded or not; None for any other
    folder."""
    match = _ARCHIVE.fullmatch(folder)
    return _PURE.get(match[1].casefold() if match else folder.casefold())


def class_name(folder: str) -> str:
    """What a class is called in tables and figures: the paper's name where it has one, else the folder's.

    A name that a spreadsheet would run as a formula (`=HYPERLINK(…)`) gets an apostrophe in front, so that
    every CSV written later is safe to open.
    """
    return harmless(paper_name(folder) or folder)


def land_names(columns: list[str]) -> list[str]:
    """What the classes of a CSV of Land-1.0 are called: by the paper where all are its classes, else as
    they are."""
    known = {}
    for short, name in LAND_NAMES.items():
        known[bare_name(short)] = known[bare_name(name)] = name
    names = [known.get(bare_name(column)) for column in columns]
    return [harmless(name) for name in (columns if None in names else names)]


def bare_name(name: str) -> str:
    """A name without case, blanks, underscores and signs."""
    return re.sub(r"[\W_]", "", name).casefold()


def class_key(folder: str) -> str:
    """The same for all spellings of one class: case, zero padding and `_` padding do not tell classes
    apart."""
    known = paper_name(folder)
    if known:
        return known
    plain = re.sub(r"[\s_]+", "_", plain_name(folder)).strip("_")
    return re.sub(r"^0+(?=[0-9])", "", plain)


def plain_name(name: str) -> str:
    """A name without the difference of case and of how an accent is encoded (archives made on a Mac)."""
    return unicodedata.normalize("NFC", name).casefold()
