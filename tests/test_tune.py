"""The tuner on a fake training script: known learning curves, log.csv, config.yaml, checkpoint, no torch."""

import contextlib
import dataclasses
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import tune  # noqa: E402

draw_picture, flag_importance = tune.draw_picture, tune.flag_importance

# log10(lr) near -2 is best from the start, lr 0.5 is poor at epoch 1 and best from epoch 4 on; the loss ranks
# them the other way. Some rates break: 6 diverges, 7 exits, 8 collapses in epoch 2 and then hangs, 9 is
# killed until "healed".
FAKE = r"""
import argparse, fcntl, json, math, os, signal, sys, time
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
for name in "data config init loader precision optimizer device protocol ratios seeds".split():
    parser.add_argument("--" + name)
parser.add_argument("--seed", type=int, default=0)
numbers = "size batch-size weight-decay subset workers out-dim warmup-epochs hidden jitter min-area blur"
for name in numbers.split():
    parser.add_argument("--" + name, type=float)
parser.add_argument("--method", choices=["barlow", "moco"], default="barlow", help="or\n  --not-a-flag")
parser.add_argument("--lr", type=float, default=0.1, help="rate")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--stop-epoch", type=int)
parser.add_argument("--knn-every", type=int, default=0)
parser.add_argument("--pause", type=float, default=0)
parser.add_argument("--out", default="runs/fake")
if "--config" in sys.argv:
    import yaml
    parser.set_defaults(**yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1])))
args = parser.parse_args()
args.precision = args.precision or "bf16"  # as train_ssl.py resolves `auto`

def write(name, text):
    with open(os.path.join(args.out, name + ".new"), "w") as file:
        file.write(text)
    os.replace(os.path.join(args.out, name + ".new"), os.path.join(args.out, name))

def note(name, text):
    with open(os.path.join(args.out, name), "a") as file:
        file.write(text)

os.makedirs(args.out, exist_ok=True)
alone = open(os.path.join(args.out, "alone"), "w")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    note("overlap", "two processes\n")
signal.signal(signal.SIGTERM, lambda *_: (note("saved", ""), sys.exit(143)))
note("pids", f"{os.getpid()}\n")
about = {"torch": "0", "commit": "none", "collapsed_below": {"feature_std": 0.02, "effective_rank": 2}}
about["val_images"] = 10 if args.data == "few" else 500
write("config.yaml", json.dumps(vars(args) | about))
if args.lr == 6:  # train_ssl.py stops by itself, and leaves the epoch's row without a loss
    write("log.csv", "epoch,loss,feature_std,effective_rank,knn_macro_f1\n1,,,,\n")
    sys.exit("error: the loss is not finite at epoch 1, step 3: lower --lr")
if args.lr == 7:
    sys.exit("reading tiles\n\ncannot train at 7")
if args.lr == 9 and not os.path.exists("healed"):
    os.kill(os.getpid(), signal.SIGKILL)
path = os.path.join(args.out, "checkpoint.json")
state = json.load(open(path)) if os.path.exists(path) else {"rows": [], "weights": 0.5}
for epoch in range(len(state["rows"]) + 1, (args.stop_epoch or args.epochs) + 1):
    time.sleep(args.pause)
    quality = 1 / (1 + abs(math.log10(args.lr) + 2)) + args.seed % 100 / 1000
    score = quality * (1 - 0.5**epoch) if args.lr != 0.5 else epoch / 4 - 0.02
    state["weights"] = math.sin(37 * state["weights"] + args.lr + epoch / args.epochs)
    gone = args.lr == 8 and epoch >= 2
    knn = repr(score) if args.knn_every and epoch % args.knn_every == 0 and args.data != "unlabelled" else ""
    health = "0.0,1.0" if gone else "0.2,40.0"
    state["rows"].append(f"{epoch},{5 + score},{health},{knn},{state['weights']},10")
    header = "epoch,loss,feature_std,effective_rank,knn_macro_f1,weights,seconds"
    write("log.csv", "\n".join([header, *state["rows"]]) + "\n")
    write("checkpoint.json", json.dumps(state))
    note("journal", f"{epoch}\n")
    if gone:
        time.sleep(0 if "x" in (args.data or "") else 60)
"""

# A script without --stop-epoch that writes results.csv, as transfer.py does: rmse is best (lowest) at lr 0.1.
FAKE_TRANSFER = r"""
import argparse, os
parser = argparse.ArgumentParser()
for name in "lr momentum epochs".split():
    parser.add_argument("--" + name, type=float)
parser.add_argument("--seeds", nargs="+")
parser.add_argument("--loss")
parser.add_argument("--every", action="store_true")
parser.add_argument("--summary", action="store_true")
parser.add_argument("--out")
args = parser.parse_args()
os.makedirs(args.out)
rows = ["seed,epoch,split,metric,class,value"]
for seed in range(2):
    for epoch in range(1, 4) if args.every else [3]:
        rmse = abs(args.lr - 0.1) + 1 / args.epochs + seed / 100 + (epoch - 3 + seed) ** 2 * args.every
        kinds = [f"val,rmse,all,{rmse}", "val,rmse,Forest,9", "test,rmse,all,7", f"val,r2,all,{-rmse}"]
        rows += [f"{seed},{epoch},{kind}" for kind in kinds]
if args.summary:
    rows = ["split,metric,epoch,mean,std,n", f"val,rmse,3,{args.lr},0,2", f"val,rmse,2,{args.lr + 1},0,2"]
    rows.append("test,rmse,3,9,0,2")
name = "summary.csv" if args.summary else "results.csv"
open(os.path.join(args.out, name), "w").write("\n".join(rows) + "\n")
"""

NINE = [1e-4, 3e-4, 1e-3, 4e-3, 1e-2, 2e-2, 0.2, 0.5, 2.0]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "train_ssl.py").write_text(FAKE)
    (tmp_path / "transfer.py").write_text(FAKE_TRANSFER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune.signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    monkeypatch.setattr(tune, "draw_picture", lambda *_: None)  # half a second each; the first test draws
    monkeypatch.setattr(tune, "flag_importance", lambda *_: pd.DataFrame())  # and two seconds for the forests
    return tmp_path


def command(grid: dict, *words: str) -> list[str]:
    Path("grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    script = [] if "--script" in words else ["--script", "train_ssl.py"]
    return [
        "tune.py",
        "--grid",
        "grid.yaml",
        *([] if "--out" in words else ["--out", "out"]),
        *script,
        *words,
    ]


def search(monkeypatch, grid: dict, *words: str, code: int = 0) -> pd.DataFrame:
    """Runs the tuner in this process; returns trials.csv. `code`: of its exit, 1 where trials fail."""
    with tune.one_line_errors(), pytest.raises(SystemExit) if code == 1 else contextlib.nullcontext() as left:
        tune.main(command(grid, *words)[1:])
    assert not left or left.value.code == 1
    return pd.read_csv(
        words[words.index("--out") + 1] + "/trials.csv" if "--out" in words else "out/trials.csv"
    )


def trained(trial: int, out: str = "out") -> list[int]:
    return [int(line) for line in Path(f"{out}/trials/{trial:03d}/journal").read_text().split()]


def same_but_time(a: pd.DataFrame, b: pd.DataFrame) -> None:
    times = ["seconds", "total_seconds", "front"]
    pd.testing.assert_frame_equal(a.drop(columns=times), b.drop(columns=times))


def test_halving_follows_the_curves_and_the_survivor_equals_an_uninterrupted_run(
    workplace, monkeypatch, capsys
):
    monkeypatch.setattr(tune, "draw_picture", draw_picture)
    table = search(monkeypatch, {"lr": NINE}, "--method", "moco")
    assert table.groupby("rung").size().to_dict() == {1: 9, 3: 3, 9: 1}
    assert sorted(table[table.rung == 3].lr) == [4e-3, 1e-2, 2e-2]  # not 0.5, which blooms late
    assert list(table[table.rung == 9].lr) == [1e-2]
    assert list(table[table.rung == 1].status).count("promoted") == 3
    assert [len(trained(i)) for i in range(9)] == [1, 1, 1, 3, 9, 3, 1, 1, 1]
    assert trained(4) == list(range(1, 10))  # no epoch twice
    assert table.iloc[0].knn_macro_f1 == 1 - 0.5**9 and table.iloc[0]["rank"] == 1
    assert list(table[table.rung == 1]["rank_loss"]) == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert "Spearman correlation of the two rankings: -1.00" in capsys.readouterr().out
    assert {"search.png", "best.yaml", "search.yaml"} <= set(os.listdir("out"))

    total = table[table.trial == 4].set_index("rung")[["seconds", "total_seconds"]]
    assert total.total_seconds.tolist() == pytest.approx(total.seconds.sort_index().cumsum()[total.index])
    head = Path("out/best.yaml").read_text().splitlines()[2]
    assert head == "# the search's own, for a long run to overrule: epochs 9"
    best = yaml.safe_load(Path("out/best.yaml").read_text())
    assert (
        best["lr"] == 1e-2
        and best["method"] == "moco"
        and best["epochs"] == 9
        and not {"out", "torch", "precision"} & set(best)
    )
    python, *words = Path("out/best.yaml").read_text().splitlines()[0].removeprefix("# ").split()
    subprocess.run([sys.executable, *words], check=True)
    for name in ("log.csv", "checkpoint.json"):
        assert Path("out/best", name).read_bytes() == Path("out/trials/004", name).read_bytes()


def test_plain_search_finds_the_late_bloomer(workplace, monkeypatch):
    table = search(monkeypatch, {"lr": [1e-2, 0.5], "min_epochs": 4, "max_epochs": 4})
    assert list(table.lr) == [0.5, 1e-2] and set(table.rung) == {4}


def test_rungs_counts_and_eta():
    def plan(trials, low, high, eta, resumes=True):
        levels = tune.rung_levels(low, high, eta)
        options = {"stop_epoch": "--stop-epoch"} if resumes else {}
        return tune.Search(Path("s"), options, [], [{}] * trials, levels, eta, "loss", Path("o"), 1).plan()

    assert plan(270, 4, 12, 4) == [(4, 270, 4), (12, 67, 8)]
    assert plan(2, 1, 9, 3) == [(1, 2, 1), (3, 1, 2), (9, 1, 6)]
    assert plan(8, 2, 5, 2) == [(2, 8, 2), (4, 4, 2), (5, 2, 1)]
    assert plan(10, 75, 100, 4, resumes=False) == [(75, 10, 75), (100, 2, 100)]
    assert plan(5, 7, 7, 3) == [(7, 5, 7)]


def test_every_flag_arrives_in_the_childs_config(workplace, monkeypatch):
    grid = {
        "lr": ["1e-3", 0.01],
        "warmup-epochs": [0, 1],
        "compile": [True, False],
        "batch_size": 512,
        "subset": 0.4,
    }
    table = search(
        monkeypatch, grid, "--max-epochs", "1", "--data", "some where", "--subset", "0.1", "--workers", "2"
    )
    assert len(table) == 8
    for _, row in table.iterrows():
        config = yaml.safe_load(Path(f"out/trials/{row.trial:03d}/config.yaml").read_text())
        assert (config["lr"], config["warmup_epochs"], config["compile"]) == (
            row.lr,
            row.warmup_epochs,
            row.compile,
        )
        assert config["data"] == "some where" and config["batch_size"] == 512
        assert config["subset"] == 0.1  # the command line before the grid's fixed value
        assert config["epochs"] == 1 and config["knn_every"] == 1


def test_random_draws_are_seeded_and_inside_their_bounds():
    entries = {
        "lr": ("log_uniform", ["1e-4", 0.1]),
        "momentum": ("uniform", [0.8, 0.99]),
        "hidden": ("choice", [1, 2]),
        "out_dim": ("list", [3, 4]),
    }
    trials = tune.draw_trials(entries, 200, seed=1)
    assert trials == tune.draw_trials(entries, 200, seed=1) != tune.draw_trials(entries, 200, seed=2)
    assert all(1e-4 <= t["lr"] <= 0.1 and 0.8 <= t["momentum"] <= 0.99 for t in trials)
    assert 70 < sum(t["lr"] < 10**-2.5 for t in trials) < 130  # even in the logarithm
    assert {(t["hidden"], t["out_dim"]) for t in trials} == {(1, 3), (1, 4), (2, 3), (2, 4)}
    lists = {"lr": ("list", [1, 2, 3]), "hidden": ("list", [4, 5])}
    assert len(tune.draw_trials(lists, None, 0)) == 6
    some = tune.draw_trials(lists, 4, 0)
    assert len({json.dumps(t) for t in some}) == 4


def test_one_worker_and_three_give_the_same_leaderboard_and_ties_go_to_the_lower_number(
    workplace, monkeypatch
):
    grid = {"momentum": [0.9, 0.99, 0.5], "lr": [1e-2, 7]}  # momentum changes nothing
    one = search(monkeypatch, grid, "--out", "one", "--max-epochs", "3", "--workers", "1", code=1)
    three = search(monkeypatch, grid, "--out", "three", "--max-epochs", "3", "--workers", "3", code=1)
    same_but_time(one, three)
    assert list(one[one.rung == 3].trial) == [0, 2]  # of the three equal ones
    assert (
        Path("one/best.yaml").read_text().split("\n", 1)[1]
        == Path("three/best.yaml").read_text().split("\n", 1)[1]
    )


def test_a_trial_gets_a_gpu_a_share_of_the_cores_and_nothing_of_torchrun(monkeypatch):
    given = {
        "CUDA_VISIBLE_DEVICES": "4,6",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "RANKING": "kept",
    }
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(tune, "cores", lambda: 8)
    env = tune.environment(workers=1, slot=0)
    assert env["CUDA_VISIBLE_DEVICES"] == "6" and env["OMP_NUM_THREADS"] == "4" and env["RANKING"] == "kept"
    assert not {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    } & set(env)


def alive(out: Path) -> list[int]:
    pids = [int(pid) for path in out.glob("trials/*/pids") for pid in path.read_text().split()]
    state = lambda pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]


def amid_the_second_rung(out: Path) -> bool:
    """Whether a trial's second process runs: one of the first rung may be about to end by itself."""
    pids = [path.read_text().split() for path in out.glob("trials/*/pids")]
    return bool({int(two[1]) for two in pids if len(two) == 2} & set(alive(out)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and prctl is Linux's")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_tuner_leaves_no_trial_running_and_the_same_command_goes_on(workplace, monkeypatch, how):
    grid, words = {"lr": NINE[3:7]}, ("--max-epochs", "4", "--eta", "2", "--workers", "2", "--out")
    slow = ("--pause", "1.5")  # a trial that is seen alive shall not end before the signal
    full = [sys.executable, ROOT / "tune.py", *command(grid, *words, "killed", *slow)[1:]]
    tuner = subprocess.Popen(full, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not amid_the_second_rung(Path("killed")):
        assert tuner.poll() is None
        time.sleep(0.02)
    tuner.send_signal(how)
    assert tuner.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how]
    time.sleep(0.2)
    assert not alive(Path("killed"))
    assert bool(list(Path("killed").glob("trials/*/saved"))) == (how == signal.SIGTERM)
    before = pd.read_csv("killed/trials.csv")  # whole, whenever the kill came
    again = search(monkeypatch, grid, *words, "killed", *slow)
    straight = search(monkeypatch, grid, *words, "straight")
    same_but_time(again, straight)
    assert len(before) >= 4 and not list(Path("killed").glob("trials/*/overlap"))
    assert [trained(i, "killed") for i in range(4)] == [trained(i, "straight") for i in range(4)]


def test_an_orphaned_trial_is_waited_for(workplace, monkeypatch):
    monkeypatch.setattr(tune, "LIBC", None)  # as on systems without prctl
    monkeypatch.setattr(tune, "stop", lambda jobs: None)
    monkeypatch.setattr(tune, "judge", lambda search, job: sys.exit("the tuner dies"))
    words = ("--max-epochs", "3", "--min-epochs", "3", "--pause", "0.2")
    with pytest.raises(SystemExit, match="dies"):
        search(monkeypatch, {"lr": [0.01]}, *words)
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(tune.signal, "signal", lambda *_: None)
    monkeypatch.setattr(tune, "draw_picture", lambda *_: None)
    search(monkeypatch, {"lr": [0.01]}, *words)
    assert trained(0) == [1, 2, 3] and not Path("out/trials/000/overlap").exists()


def test_failed_collapsed_and_killed_trials_are_recorded_and_the_rest_go_on(workplace, monkeypatch):
    grid, words = (
        {"lr": [7, 8, 9, 1e-2, 1e-3, 6]},
        ("--min-epochs", "3", "--max-epochs", "3", "--workers", "3"),
    )
    began = time.time()
    table = search(monkeypatch, grid, *words, code=1).set_index("trial")
    assert time.time() - began < 30  # the collapsed trial would hang for a minute
    assert dict(table.status) == {
        0: "failed",
        1: "collapsed",
        2: "failed",
        3: "done",
        4: "done",
        5: "collapsed",
    }
    assert table.reason[0] == "exit code 1: reading tiles | cannot train at 7"
    assert table.reason[1] == "feature_std is 0 in epoch 2" and table.epochs[1] == 2
    assert (
        table.reason[2] == "killed by signal 9" and len(Path("out/trials/002/pids").read_text().split()) == 2
    )
    assert yaml.safe_load(Path("out/best.yaml").read_text())["lr"] == 1e-2

    Path("healed").touch()
    again = search(monkeypatch, grid, *words, code=1).set_index("trial")
    assert dict(again.status) == {**dict(table.status), 2: "done"} and trained(3) == [1, 2, 3]
    assert len(Path("out/trials/003/pids").read_text().split()) == 1  # what is done is not started again


def test_collapse_rules():
    good = {"loss": -3.0, "feature_std": 0.5, "effective_rank": 30.0}
    least = {"feature_std": 0.02, "effective_rank": 2}
    fine = good | {"feature_std": 0.03, "effective_rank": 2.5}
    assert tune.collapse(pd.DataFrame([good, fine]), least) == (0, "")
    for log in (pd.DataFrame([{"loss": 1.0}]), pd.DataFrame()):
        assert tune.collapse(log, least) == (0, "")
    assert tune.collapse(pd.DataFrame([good | {"feature_std": 0.001}]), {}) == (0, "")
    nan, inf = float("nan"), float("inf")
    for name, value in [("loss", nan), ("loss", inf), ("effective_rank", 1.9), ("feature_std", nan)]:
        epoch, reason = tune.collapse(pd.DataFrame([good, good | {name: value}, good]), least)
        assert epoch == 2 and reason.startswith(f"{name} is")


def test_a_row_still_being_written_is_not_read(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,feature_std\n1,0.5\n2,0.0")
    assert list(tune.read_log(tmp_path, 9).feature_std) == [0.5]


@pytest.mark.parametrize("data, said", [("few", True), ("many", False)])
def test_few_val_images_are_told(workplace, monkeypatch, capsys, data, said):
    search(monkeypatch, {"lr": [1e-3, 1e-2]}, "--data", data, "--max-epochs", "1")
    assert ("val has 10 images, which are few" in capsys.readouterr().out) == said


def test_ranking_by_loss_warns_and_keeps_collapsed_trials(workplace, monkeypatch, capsys):
    words = ("--metric", "loss", "--max-epochs", "2", "--min-epochs", "2", "--data", "x")
    table = search(monkeypatch, {"lr": [1e-2, 8, 1e-4]}, *words)
    assert "warning" in capsys.readouterr().err
    assert list(table.lr) == [8, 1e-4, 1e-2] and set(table.status) == {"done"}
    assert table.reason[0] == "feature_std is 0 in epoch 2" and "knn_macro_f1" in table


def test_results_csv_of_a_script_without_stop_epoch(workplace, monkeypatch):
    grid = {"lr": [1, "1e-1", 0.5], "seeds": [["1", "2"]], "momentum": 0.9}
    table = search(monkeypatch, grid, "--script", "transfer.py", "--min-epochs", "5", "--max-epochs", "10")
    assert list(table[table.rung == 5].sort_values("rmse").lr) == [0.1, 0.5, 1]
    assert list(table[table.rung == 10].lr) == [0.1]
    assert table.rmse[0] == pytest.approx(0.1 + 0.005)  # the mean of the seeds' val rows
    # no config.yaml: the swept flags alone
    assert yaml.safe_load(Path("out/best.yaml").read_text())["lr"] == "1e-1"
    words = (
        "--script",
        "transfer.py",
        "--max-epochs",
        "1",
        "--every",
        "--out",
    )  # seed 0 is best at epoch 3, 1 at 2
    both = search(monkeypatch, {"lr": [0.1], "loss": ["bce", "softmax"]}, *words, "all")
    assert list(both.rmse) == pytest.approx([1 + 0.005 + 0.5] * 2) and list(both.loss) == ["bce", "softmax"]
    r2 = search(monkeypatch, {"lr": [0.1]}, *words, "r2", "--metric", "r2").r2[0]
    assert r2 == pytest.approx(-1 - 0.005 - 0.5)


def test_a_script_that_leaves_no_numbers_is_told_which_are_read(workplace, monkeypatch):
    flags = [f"parser.add_argument('--{name}')" for name in ("lr", "epochs", "out")]
    lines = ["import argparse", "parser = argparse.ArgumentParser()", *flags, "parser.parse_args()"]
    Path("mute.py").write_text("\n".join(lines))
    with pytest.raises(SystemExit):  # no trial is left
        search(monkeypatch, {"lr": [0.1]}, "--script", "mute.py", "--max-epochs", "1")
    reason = pd.read_csv("out/trials.csv").reason[0]
    assert "no summary.csv, and log.csv is read of scripts that have --stop-epoch" in reason


def test_summary_csv_comes_before_results_csv(workplace, monkeypatch):
    words = ("--script", "transfer.py", "--max-epochs", "1", "--summary")
    table = search(monkeypatch, {"lr": [1, 0.25]}, *words)
    assert list(table.rmse) == [0.75, 1.5]  # the mean of the two cells on val, test left alone


@pytest.mark.parametrize(
    "grid, words, message",
    [
        ({"learning_rat": [1]}, [], "no flag learning_rat; the nearest is"),
        ({"lr": []}, [], "lr: no value can be drawn from list []"),
        ({"lr": [None, 1]}, [], "lr: an empty value in [None, 1]: fill it in or leave it out"),
        ({"lr": {"choice": [1, ""]}}, ["--trials", "3"], "lr: an empty value in [1, '']"),
        ({"lr": [1, []]}, [], "lr: an empty value in [1, []]"),
        ({"lr": [1], "momentum": ""}, [], "momentum has no value"),
        ({"lr": None, "hidden": [1, 2]}, [], "lr has no value"),
        ({"lr": {}}, [], "lr: {} is no distribution"),
        ({"lr": [1], "trials": None}, [], "grid.yaml: trials has no value"),
        ({"lr": {"uniform": [1, float("nan")]}}, ["--trials", "3"], "lr: no value can be drawn from uniform"),
        ({"lr": [1]}, ["--budget-minutes", "nan"], "argument --budget-minutes: 'nan' is not a number"),
        (
            {"lr": [1]},
            ["--script", "transfer.py", "--seeds-per-trial", "2"],
            "transfer.py has no --seed of its",
        ),
        ({"seed": [1, 2]}, ["--seeds-per-trial", "2"], "or grid.yaml sweeps it"),
        ({"lr": [1]}, ["--seeds-per-trial", "2", "--seeds", "5"], "has --seeds of its own: add --seeds 1"),
        ({"lr": [1]}, ["--seeds-per-trial", "2", "--seeds", "1", "2"], "has --seeds of its own"),
        ({"lr": [1], "seeds": [42, 5]}, ["--seeds-per-trial", "2"], "has --seeds of its own: add --seeds 1"),
        ({"lr": [1, 2], "blur": False}, [], "blur takes a value: true, false, yes, no, on, off"),
        ({"lr": [False, 0.1]}, [], "lr takes a value: true, false"),
        ({"lr": {"log_unifrom": [1, 2]}}, [], "log_unifrom is no distribution; the nearest is log_uniform"),
        (
            {"lr": {"log_uniform": [0, 2]}},
            ["--trials", "3"],
            "lr: no value can be drawn from log_uniform [0, 2]",
        ),
        ({"lr": {"choice": "adam"}}, ["--trials", "3"], "lr: no value can be drawn from choice adam"),
        (
            {"lr": {"uniform": [1, 2], "choice": [1]}},
            ["--trials", "3"],
            "lr: uniform, choice is no distribution",
        ),
        ({"lr": [1]}, ["--out", "train_ssl.py"], "train_ssl.py: File exists"),
        ({"lr": [1]}, ["--trials", "many"], "argument --trials: 'many' is not a whole number"),
        ({"lr": {"uniform": [1]}}, ["--trials", "3"], "lr: no value can be drawn from uniform [1]"),
        ({"lr": {"uniform": [1, 2]}}, [], "how many trials with --trials"),
        ({"lr": [1], "epochs": [3]}, [], "epochs is set by the tuner: use --max-epochs"),
        ({"lr": [1]}, ["--stop-epoch", "3"], "stop-epoch is set by the tuner"),
        ({"lr": [1]}, ["--lr", "3"], "--lr is swept by grid.yaml and also given"),
        ({"lr": [1]}, ["--not-a-flag"], "no flag not-a-flag"),
        ({"lr": 1}, [], "sweeps nothing"),
        ({"lr": ["1e-3", 0.001]}, [], "lr: a value stands twice in ['1e-3', 0.001]"),
        ({"lr": [0.1], "min-epochs": 2}, [], "min-epochs is a flag of tune.py: give it on the command line"),
        ({"lr": [0.1, 0.2, 0.2]}, [], "lr: a value stands twice in [0.1, 0.2, 0.2]"),
        ({"lr": [1, 1.0]}, [], "a value stands twice"),
        ({"lr": [1]}, ["--eta", "1"], "argument --eta: 1 must be at least 2"),
        ({"lr": {"uniform": [1, 2]}}, ["--trials", "9" * 30], "9 must be at most 100000"),
        (dict.fromkeys(("lr", "momentum", "hidden"), [*range(100)]), [], "the grid has 1,000,000 points"),
        ({"lr": [1]}, ["--min-epochs", "4", "--max-epochs", "3"], "--max-epochs is 3, must be at least 4"),
        ({"lr": [1]}, ["--metric", "knn_f1"], "logs no knn_f1 (--metric); the nearest is knn_macro_f1"),
        ({"lr": [1]}, ["--script", "transfer.py", "--metric", "f1_macro"], "logs no f1_macro (--metric)"),
        (
            {"hidden": {"uniform": [32, 64]}},
            ["--trials", "2", "--method", "simclr", "--script", str(ROOT / "train_ssl.py")],
            "train_ssl.py refuses the first trial: argument --hidden: '62.4' is not a whole number",
        ),
        ({"lr": [1]}, ["--script", "missing.py"], "missing.py: no such file"),
        ({"lr": [1]}, ["--script", "broken.py"], "broken.py --help failed: NameError"),
        ([1, 2], [], "grid.yaml does not hold names and values"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workplace, monkeypatch, capsys, grid, words, message):
    Path("broken.py").write_text("oops\n")
    with pytest.raises(SystemExit) as stop:
        search(monkeypatch, grid, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Trace"))]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("second", ["lr: [3]", "l-r: [3]", "size: {lr: [3], lr: [4]}"])
def test_a_flag_that_stands_twice_is_refused(workplace, second):
    Path("twice.yaml").write_text(f"l_r: [1]\nlr: [1, 2]\n{second}\n")
    with pytest.raises(tune.ConfigError, match="l_?r stands twice"):
        tune.read_yaml(Path("twice.yaml"))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("32:48", "32:48"),
        ("010", "010"),
        ("2020-13-45", "2020-13-45"),
        ("1e-3", "1e-3"),
        ("[10, -1, 0]", [10, -1, 0]),
        ("[.5, 1.0e-05, 1.]", [0.5, 1e-5, 1.0]),
        ("[.inf, no, 'no', null]", [float("inf"), False, "no", None]),
    ],
)
def test_yaml_is_read_as_a_command_line(workplace, text, read):
    Path("values.yaml").write_text(f"size: {text}\n")
    here = tune.read_yaml(Path("values.yaml"))["size"]
    there = yaml.load(Path("values.yaml").read_text(), common.FlagLoader)["size"]
    for found in (here, there):
        assert found == read and type(found) is type(read)


@pytest.mark.parametrize("value", ["9" * 5000, "!!int x", "!!bool x", "!!timestamp x"])
def test_yaml_whose_values_are_none_of_their_kind_is_refused(workplace, value):
    Path("values.yaml").write_text(f"lr: {value}\n")
    with pytest.raises(tune.ConfigError, match="values.yaml: not readable as YAML"):
        tune.read_yaml(Path("values.yaml"))


def test_yaml_that_is_nested_too_deep_is_refused(workplace):
    Path("deep.yaml").write_text("lr: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(tune.ConfigError, match="nested too deep"):
        tune.read_yaml(Path("deep.yaml"))


def test_the_runs_of_a_trial_share_no_seed(workplace, monkeypatch):
    """A script that has its own --seeds trains one a run, from the seed of its --config on."""
    Path("own.yaml").write_text("seed: 7\n")
    words = ("--max-epochs", "1", "--config", "own.yaml", "--seeds=1", "--seeds-per-trial", "2")
    search(monkeypatch, {"lr": [0.1]}, *words)
    configs = [yaml.safe_load(path.read_text()) for path in sorted(Path("out/trials").glob("*/config.yaml"))]
    assert [(config["seed"], str(config["seeds"])) for config in configs] == [(7, "1"), (8, "1")]


def test_the_plan_takes_no_place_of_a_pipe(workplace, monkeypatch, capsys):
    os.mkfifo("pipe")
    with pytest.raises(SystemExit) as stop:
        search(monkeypatch, {"lr": [1]}, "--dry-run", "--plan-to", "pipe")
    assert stop.value.code == 2 and "pipe is a folder or a device" in capsys.readouterr().err
    assert Path("pipe").is_fifo()


def test_a_dollar_in_a_value_is_drawn(workplace, monkeypatch):
    monkeypatch.setattr(tune, "draw_picture", draw_picture)
    search(monkeypatch, {"init": ["a$^$b", "c"]}, "--max-epochs", "1")
    assert Path("out/search.png").exists()


def test_the_directory_of_another_search_is_refused_and_left_alone(workplace, monkeypatch, capsys):
    search(monkeypatch, {"lr": [1e-2, 1e-3]}, "--max-epochs", "1")
    before = Path("out/trials.csv").read_bytes()
    for grid, words, name in [
        ({"lr": [1e-2, 1e-4]}, [], "trial 1 there, {'lr': 0.001}, is none of the 2 here"),
        ({"lr": [1e-2, 1e-3]}, ["--momentum", "0.5"], "flags is"),
        ({"lr": [1e-2, 1e-3]}, ["--metric", "loss"], "metric is knn_macro_f1 there and loss"),
    ]:
        with pytest.raises(SystemExit) as stop:
            search(monkeypatch, grid, "--max-epochs", "1", *words)
        assert stop.value.code == 2 and name in capsys.readouterr().err
    assert Path("out/trials.csv").read_bytes() == before
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    with pytest.raises(SystemExit) as stop:
        search(monkeypatch, {"lr": [1]}, "--out", "photos")
    assert stop.value.code == 2 and os.listdir("photos") == ["cat.jpg"]


@pytest.mark.parametrize(
    "name, plan",
    [
        ("tune_ssl", "10 trials to epoch 1 (1 epochs each), 2 trials to epoch 5 (4 epochs each): 18 epochs"),
        ("tune_transfer", "4 trials to epoch 15 (15 epochs each): 60 epochs"),
        (
            "paper/tune_ssl",
            "270 trials to epoch 4 (4 epochs each), 67 trials to epoch 12 (8 epochs each): 1616 epochs",
        ),
        ("paper/tune_transfer", "30 trials to epoch 75 (75 epochs each), 7 trials to epoch 100"),
    ],
)
def test_dry_run_of_the_projects_grids_tells_the_plan_and_writes_nothing(
    workplace, monkeypatch, capsys, name, plan
):
    text = (ROOT / f"yaml/{name}.yaml").read_text()
    assert text.startswith("# python tune.py ") and f"--grid yaml/{name}.yaml" in text.split("\n")[0]
    with pytest.raises(FileNotFoundError):  # no trials.csv to read
        search(monkeypatch, yaml.safe_load(text), "--dry-run", "--seconds-per-epoch", "36")
    out = capsys.readouterr().out
    epochs = int(out.split(" epochs on ")[0].rsplit(" ", 1)[1])
    assert plan in out and (
        f"{epochs / 100:.1f} h left at 36" in out or f"{epochs * 0.6:.1f} min left at 36" in out
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words, metric",
    [
        (["--method", "moco"], "knn_macro_f1"),
        (["--script", str(ROOT / "transfer.py")], "rmse"),
        (["--script", str(ROOT / "transfer.py"), "--task", "scene"], "f1_macro"),
        (["--script", str(ROOT / "transfer.py"), "--task", "scene", "--metric", "accuracy"], "accuracy"),
        (["--script", str(ROOT / "transfer.py"), "--config", "scenes.yaml"], "f1_macro"),
    ],
)
def test_trials_are_ranked_by_the_metric_of_their_task(workplace, monkeypatch, capsys, words, metric):
    Path("scenes.yaml").write_text("task: scene\n")
    with pytest.raises(FileNotFoundError):  # a dry run: no trials.csv to read
        search(monkeypatch, {"lr": [0.1, 0.2]}, "--dry-run", *words)
    assert f"ranked by {metric};" in capsys.readouterr().out


def test_the_reason_of_a_failure_is_that_of_its_last_try(tmp_path):
    before = b"error: the disk is full\n"
    (tmp_path / "000.log").write_bytes(before + b"error: the rate is too high\n")
    assert tune.failure(tmp_path / "000", 2, len(before)) == "exit code 2: error: the rate is too high"


def test_the_plan_is_written_for_other_programs(workplace, monkeypatch):
    Path("out").mkdir()
    Path("out/search.yaml").write_text("of: another search")  # a dry run does not look there
    grid = {"lr": NINE, "min_epochs": 4, "max_epochs": 12, "eta": 4}
    with pytest.raises(FileNotFoundError):  # no trials.csv to read
        search(monkeypatch, grid, "--dry-run", "--plan-to", "plan.yaml")
    rungs = [{"epoch": 4, "trials": 9, "new_epochs": 4}, {"epoch": 12, "trials": 2, "new_epochs": 8}]
    plan = {"epochs": 52, "trials": 9, "seeds_per_trial": 1, "rungs": rungs}
    assert yaml.safe_load(Path("plan.yaml").read_text()) == plan
    assert os.listdir("out") == ["search.yaml"]


def test_copied_alone(tmp_path):
    shutil.copy(ROOT / "tune.py", tmp_path)
    (tmp_path / "train_ssl.py").write_text(FAKE)
    (tmp_path / "grid.yaml").write_text("lr: [0.01, 1.0]\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["--grid", "grid.yaml", "--out", "here", "--max-epochs", "2"]
    run = subprocess.run(
        [sys.executable, "tune.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0 and "see trials.csv" in run.stdout, run.stderr
    assert pd.read_csv(tmp_path / "here/trials.csv").lr[0] == 0.01
    assert not ROOT.joinpath("here").exists()


def test_two_ranks_share_the_trials_and_give_the_same_leaderboard(workplace, monkeypatch):
    grid, words = {"lr": NINE[2:6]}, ("--max-epochs", "2", "--eta", "2", "--pause", "0.2")
    straight = search(monkeypatch, grid, *words, "--out", "one")
    full = [sys.executable, str(ROOT / "tune.py"), *command(grid, *words, "--out", "two")[1:]]
    port = str(20000 + os.getpid() % 20000)
    place = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [subprocess.Popen(full, env=place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    same_but_time(pd.read_csv("two/trials.csv"), straight)
    assert [trained(i, "two") for i in range(4)] == [trained(i, "one") for i in range(4)]
    assert not list(Path("two").glob("trials/*/overlap"))


# A search that grows


def starts(name: str) -> int:
    return len(Path(f"out/trials/{name}/pids").read_text().split())


def test_more_trials_train_the_new_ones_alone(workplace, monkeypatch):
    grid = {"lr": {"log_uniform": [1e-4, 1]}, "momentum": {"choice": [0.5, 0.9]}}
    words = ("--max-epochs", "3", "--workers", "2", "--trials")
    six = search(monkeypatch, grid, *words, "6")
    ten = search(monkeypatch, grid, *words, "10")
    assert ten.groupby("rung").size().to_dict() == {1: 10, 3: len(set(ten[ten.rung == 3].trial))}
    both = six.merge(ten, on=["trial", "rung", "lr", "momentum", "knn_macro_f1"])
    assert len(both) == len(six)  # the old rows, under their numbers
    again = {trial: starts(f"{trial:03d}") for trial in range(10)}
    assert again == {trial: 1 + (trial in set(ten[ten.rung == 3].trial)) for trial in range(10)}
    with pytest.raises(SystemExit):  # and a search does not shrink
        search(monkeypatch, grid, *words, "6")


def test_more_values_keep_the_numbers_of_the_old_trials(workplace, monkeypatch):
    words = ("--max-epochs", "1")
    search(monkeypatch, {"lr": [1e-3, 1e-2]}, *words)
    table = search(monkeypatch, {"lr": [1e-4, 1e-3, 1e-1, 1e-2]}, *words).sort_values("trial")
    assert list(table.lr) == [1e-3, 1e-2, 1e-4, 1e-1]
    assert [starts(f"00{i}") for i in range(4)] == [1, 1, 1, 1]


def test_the_first_draws_do_not_depend_on_how_many_follow():
    grid = {"lr": ("list", [1, 2, 3]), "hidden": ("list", [4, 5])}
    drawn = {"lr": ("log_uniform", [1e-4, 1]), "hidden": ("choice", [4, 5])}
    for entries in (grid, drawn):
        trials = tune.draw_trials(entries, 6, seed=3)
        assert [tune.draw_trials(entries, n, seed=3) for n in (1, 4)] == [trials[:1], trials[:4]]
    wider = tune.draw_trials({"jitter": ("uniform", [0, 1])} | drawn, 6, seed=3)
    assert [trial | {"jitter": None} for trial in wider] == [trial | {"jitter": None} for trial in trials]


def test_a_trial_of_several_seeds_counts_by_its_mean(workplace, monkeypatch):
    grid = {"lr": [1e-2, 1e-3], "seed": 20240101, "seeds": 1}
    words = ("--max-epochs", "1", "--seeds-per-trial")
    search(monkeypatch, grid, *words, "1")
    table = search(monkeypatch, grid, *words, "3")
    configs = [yaml.safe_load(path.read_text()) for path in sorted(Path("out/trials").glob("*/config.yaml"))]
    assert sorted(config["seed"] for config in configs) == sorted(2 * [20240101, 20240102, 20240103])
    assert sorted(path.name for path in Path("out/trials").glob("000*") if path.is_dir()) == [
        "000",
        "000-seed1",
        "000-seed2",
    ]
    assert [starts(name) for name in ("000", "001", "000-seed1")] == [1, 1, 1]  # the first seed was there
    assert list(table.seeds) == [3, 3] and table.lr[0] == 1e-2
    assert table.knn_macro_f1[0] == pytest.approx(0.5 * (1 + 0.002))
    assert table.knn_macro_f1_std[0] == pytest.approx(0.5 * 0.001)
    assert yaml.safe_load(Path("out/best.yaml").read_text())["seed"] == 20240101


def test_a_run_past_its_budget_is_stopped_and_goes_on_with_a_larger_one(workplace, monkeypatch, capsys):
    grid = {"pause": [0.01, 2.4], "knn_every": 1, "min_epochs": 2, "max_epochs": 2}
    words = ("--lr", "0.01", "--budget-minutes")
    table = search(monkeypatch, grid, *words, "0.06").set_index("trial")
    assert dict(table.status) == {0: "done", 1: "over budget"} and Path("out/trials/001/saved").exists()
    assert table.reason[1] == "past 0.06 minutes" and table.isna()["rank"][1]
    assert table.epochs[1] in (0, 1) and (table.epochs[1] == 0) == table.isna().knn_macro_f1[1]
    again = search(monkeypatch, grid, *words, "0.06").set_index("trial")
    pd.testing.assert_frame_equal(again, table)
    larger = search(monkeypatch, grid, *words, "1").set_index("trial")
    assert set(larger.status) == {"done"} and trained(1) == [1, 2] and starts("000") == 1


def test_what_a_run_past_its_budget_had_reached():
    options = {"stop_epoch": "--stop-epoch"}
    search = tune.Search(Path("s"), options, [], [{}], [6], 3, "knn_macro_f1", Path("o"), 1, budget=90)
    log = pd.DataFrame({"loss": [3.0, 2, 1], "knn_macro_f1": [float("nan"), 0.4, float("nan")]})
    row = {"status": "over budget", "reason": "past 1.5 minutes", "epochs": 2, "knn_macro_f1": 0.4, "loss": 2}
    assert tune.reached(search, log) == row
    assert tune.reached(search, log[:1]) == {name: row[name] for name in ("status", "reason")} | {"epochs": 1}


# What it says


def synthetic(tmp_path: Path, quality, trials: int = 40) -> tuple[tune.Search, dict]:
    """A search that has ended; `quality` of a trial's flags is its metric, 1 + 9 lr its seconds."""
    entries = {
        "momentum": ("uniform", [0, 1]),
        "lr": ("uniform", [0, 1]),
        "optimizer": ("choice", ["sgd", "adamw"]),
    }
    drawn = tune.draw_trials(entries, trials, seed=0)
    options = {"stop_epoch": "--stop-epoch"}
    search = tune.Search(Path("s"), options, [], drawn, [5], 3, "knn_macro_f1", tmp_path, 1)
    results = {}
    for i, flags in enumerate(drawn):
        row = {"trial": i, "seed": 0, "rung": 5, "knn_macro_f1": quality(i, flags), "loss": 1.0, "epochs": 5}
        row |= {"seconds": 1.0, "total_seconds": 1 + 9 * flags["lr"], "status": "done", "reason": ""}
        results[tune.Run(i, 0, 5)] = row
    return search, results


def test_importance_finds_the_flag_that_matters(tmp_path, capsys):
    search, results = synthetic(tmp_path, lambda i, flags: flags["lr"] + 0.1 * (flags["optimizer"] == "sgd"))
    assert tune.report(search, results) == 0
    found = pd.read_csv(tmp_path / "importance.csv").set_index("flag")
    assert list(found.index)[0] == "lr" and found.importance["lr"] > 1
    assert abs(found.importance["momentum"]) < 3 * found["std"]["momentum"] < 0.3
    assert (found["std"] > 0).all() and set(found.trials) == {40} and set(found.epoch) == {5}
    assert found.explained["lr"] > 0.8 and (tmp_path / "search.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "importance at epoch 5, 40 trials: lr " in said and "predicts no trial" not in said


def test_importance_says_when_nothing_can_be_known(tmp_path, capsys):
    search, results = synthetic(tmp_path, lambda i, flags: i * 7919 % 40 / 40)  # of the trial's number alone
    tune.flag_importance(search, tune.leaderboard(search, results))
    assert "predicts no trial" in capsys.readouterr().out
    few = {run: row for run, row in results.items() if run.trial < 5}
    assert tune.flag_importance(search, tune.leaderboard(search, few)).empty
    assert "it takes 8 trials" in capsys.readouterr().out


def test_the_front_of_quality_against_seconds(tmp_path):
    search, results = synthetic(tmp_path, lambda i, flags: [0.5, 0.4, 0.6, 0.6][i], trials=4)
    for run, seconds in zip(results, [10, 20, 30, 40]):
        results[run]["total_seconds"] = seconds
    table = tune.leaderboard(search, results).sort_values("trial")
    assert list(table.front) == [True, False, True, False]
    search.metric = "loss"
    for run, loss in zip(results, [3, 2, 2, 1]):
        results[run]["loss"] = loss
    assert list(tune.leaderboard(search, results).sort_values("trial").front) == [True, True, False, True]


def test_numbers_survive_the_files_exactly(workplace, monkeypatch):
    lrs = [0.0100000001, 1e-05]
    words = ("--max-epochs", "1", "--precision", "fp32")
    search(monkeypatch, {"seed": [20240101, 20240102], "lr": lrs}, *words)
    text = pd.read_csv("out/trials.csv", dtype=str)
    assert set(text.seed) == {"20240101", "20240102"} and set(text.lr) == {"0.0100000001", "1e-05"}
    best = yaml.safe_load(Path("out/best.yaml").read_text())
    assert best["seed"] == 20240102 and best["lr"] == 0.0100000001 and best["compile"] is True
    assert best["precision"] == "fp32", "as it was asked for"


def test_a_line_a_trial_and_on_a_terminal_a_status_that_is_written_over(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    search, results = synthetic(tmp_path, lambda i, flags: 0.25, trials=3)
    job = tune.Job(tune.Run(2, 0, 5), None, time.time(), 0.0, epochs=3)
    for stream, live in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = tune.Progress(search, results, None)
        progress.show([job])
        progress.ended(results[2, 0, 5])
        assert ("\rtraining 002 (epoch 3 of 5)" in stream.getvalue()) == live
        last = stream.getvalue().splitlines()[-1]
        assert "trial 002 at epoch 5: knn_macro_f1 0.2500, 1 s; best 0.2500 (trial 000); 0.0 min left" in last


def test_any_terminal_and_any_name(workplace, monkeypatch):
    Path("grid.yaml").write_text("data: [Wälder, 森]\nmax_epochs: 1\n", encoding="utf-8")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    with tune.one_line_errors():
        tune.main(["--grid", "grid.yaml", "--script", "train_ssl.py", "--out", "out"])
    sys.stdout.flush()
    assert rb"W\xe4lder" in printed.getvalue()
    assert yaml.safe_load(Path("out/best.yaml").read_text(encoding="utf-8"))["data"] == "Wälder"


# What goes wrong


def test_damaged_results_run_again(workplace, monkeypatch, capsys):
    grid, words = {"lr": [1e-2, 1e-3, 1e-4, 2e-4]}, ("--max-epochs", "1")
    before = search(monkeypatch, grid, *words)
    for name, text in [("000", ""), ("001", '{"trial": 1'), ("002", '{"trial": 2, "status": "done"}')]:
        Path(f"out/trials/{name}-1.json").write_text(text)
    Path("out/trials/note.json").write_bytes(b"\xff")  # not of a trial
    for name in ("out/.trials.csv.999999", "out/trials/.001-1.json.999999"):  # of a tuner that was killed
        Path(name).touch()
    capsys.readouterr()
    same_but_time(search(monkeypatch, grid, *words), before)
    assert capsys.readouterr().err.count("is damaged: its run is done again") == 3
    assert [starts(f"00{i}") for i in range(4)] == [2, 2, 2, 1] and trained(0) == [1]
    assert Path("out/trials/note.json").exists()
    assert not [*Path("out").glob(".*.999999"), *Path("out/trials").glob(".*.999999")]


@pytest.mark.parametrize("damage", [b"flags: \xff\xfe", b"flags: [", b"", b"- 1"])
def test_a_damaged_yaml_is_one_line(workplace, monkeypatch, capsys, damage):
    Path("out").mkdir()
    Path("out/search.yaml").write_bytes(damage)
    with pytest.raises(SystemExit) as stop:
        search(monkeypatch, {"lr": [1]})
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: out/search.yaml")
    command({"lr": [1]})
    Path("grid.yaml").write_bytes(damage)
    with pytest.raises(SystemExit) as stop, tune.one_line_errors():
        tune.main(["--grid", "grid.yaml", "--out", "out"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: grid.yaml")


def test_no_labels_end_the_search_at_the_first_check(workplace, monkeypatch, capsys):
    grid = {"lr": NINE, "knn_every": 1, "min_epochs": 4, "max_epochs": 12, "data": "unlabelled"}
    with pytest.raises(SystemExit) as stop:
        search(monkeypatch, grid, "--pause", "0.3")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(lines) == 1
    assert "out/trials/000: knn_macro_f1 is blank in epoch 1: are there labels in val" in lines[0]
    assert len(trained(0)) < 4 and os.listdir("out/trials").count("001") == 0


def test_a_script_that_names_no_thresholds_has_none(tmp_path):
    assert tune.collapsed_below(tmp_path) == {}
    (tmp_path / "config.yaml").write_text("collapsed_below: {feature_std: .02}")
    assert tune.collapsed_below(tmp_path) == {"feature_std": 0.02}


def test_a_second_tuner_is_refused_with_the_place_of_the_first(workplace, monkeypatch, capsys):
    search(monkeypatch, {"lr": [1e-2]}, "--max-epochs", "1")
    with tune.hold(Path("out")), pytest.raises(SystemExit) as stop:
        search(monkeypatch, {"lr": [1e-2, 1e-3]}, "--max-epochs", "1")
    place = f"process {os.getpid()} on {platform.node()}"
    assert stop.value.code == 2 and f"out is in use by {place}" in capsys.readouterr().err
    # when the first has ended
    assert len(search(monkeypatch, {"lr": [1e-2, 1e-3]}, "--max-epochs", "1")) == 2


def test_a_seed_without_a_number_leaves_the_mean_without_one(tmp_path):
    search, results = synthetic(tmp_path, lambda i, flags: 0.5, trials=2)
    rows = list(results.values())
    rows[1] |= {"loss": float("nan")}
    assert pd.isna(tune.mean_row(search, rows)["loss"]) and tune.mean_row(search, rows)["knn_macro_f1"] == 0.5


def test_importance_is_of_trials_that_the_forest_has_not_seen(tmp_path):
    search, results = synthetic(tmp_path, lambda i, flags: i * 7919 % 40 / 40)  # of the trial's number alone
    found = tune.flag_importance(search, tune.leaderboard(search, results))
    print(found)
    assert found.importance.max() < 0.3 and found.explained.max() < 0.1


def test_the_time_left_is_shared_by_the_workers(tmp_path):
    search, results = synthetic(tmp_path, lambda i, flags: 0.5)
    quarter = {run: row | {"seconds": 500.0} for run, row in results.items() if run.trial < 10}
    said = [tune.time_left(dataclasses.replace(search, workers=workers), quarter) for workers in (1, 3)]
    assert said == ["4.2 h left at 100 s an epoch", "83.3 min left at 100 s an epoch"]


@pytest.mark.parametrize(
    "grid, words, said",
    [
        ({}, ["--max-epochs", "3"], "rungs is [1] there and [1, 3] here"),
        ({}, ["--eta", "2"], "eta is 3 there and 2 here"),
        ({"seed": 4}, [], "first_seed is 0 there and 4 here"),
    ],
)
def test_a_search_in_other_steps_or_from_another_seed_is_refused(
    workplace, monkeypatch, capsys, grid, words, said
):
    search(monkeypatch, {"lr": [1e-2]}, "--max-epochs", "1")
    with pytest.raises(SystemExit) as stop:
        search(monkeypatch, {"lr": [1e-2]} | grid, "--max-epochs", "1", *words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("status", ["failed", "collapsed", "over budget"])
def test_a_trial_is_as_its_worst_seed(tmp_path, status):
    search, results = synthetic(tmp_path, lambda i, flags: 0.5, trials=2)
    done, other = results.values()
    for order in (1, -1):
        runs = [done, other | {"status": status, "reason": "why", "epochs": 3}][::order]
        row = tune.mean_row(search, runs)
        assert (row["status"], row["reason"], row["epochs"]) == (status, "why", 3)
