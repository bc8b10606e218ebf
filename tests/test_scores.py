"""The numbers of transfer.py: metrics, heads, which epoch counts, and results.csv."""

import contextlib
import os
import signal
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from common import ConfigError
from models.probe import linear_heads, nearest, principal_axes, probabilities
from scores import choose_epoch, fraction_metrics, scene_metrics, summarise
from scores.printed import exact, ratio_name, ratio_rank, table
from scores.results import COLUMNS, Results, write_confusion, write_embeddings

CLASSES = list("abcdefghij")


# Metrics and heads


def test_fraction_metrics():
    truth = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])
    predicted = np.array([[0.8, 0.2, 0], [0, 0.4, 0.6], [0.5, 0.5, 0]])
    found = fraction_metrics(truth, predicted, ["x", "y", "z"])
    per_class = np.sqrt([0.04 / 3, (0.04 + 0.36) / 3, 0.36 / 3])
    assert [found["rmse", c] for c in "xyz"] == pytest.approx(per_class)
    assert per_class == pytest.approx(
        metrics.root_mean_squared_error(truth, predicted, multioutput="raw_values")
    )
    assert found["rmse", "all"] == pytest.approx(metrics.root_mean_squared_error(truth, predicted))
    assert found["rmse_pooled", "all"] == pytest.approx(np.sqrt(((truth - predicted) ** 2).mean()))
    assert found["rmse", "all"] < found["rmse_pooled", "all"] - 0.01  # mean of roots and root of mean differ
    assert found["mae", "all"] == pytest.approx(metrics.mean_absolute_error(truth, predicted))
    assert found["r2", "all"] == pytest.approx(metrics.r2_score(truth, predicted))


def test_scene_metrics():
    found = scene_metrics(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ["x", "y", "z"])
    assert (
        found["f1", "x"] == pytest.approx(0.8)
        and found["f1", "y"] == pytest.approx(2 / 3)
        and found["f1", "z"] == 0
    )
    assert found["f1_macro", "all"] == pytest.approx((0.8 + 2 / 3) / 3)  # a class that never occurs counts
    assert found["f1_micro", "all"] == found["accuracy", "all"] == 0.75 and found[
        "f1_weighted", "all"
    ] == pytest.approx(0.75 * 0.8 + 0.25 * 2 / 3)
    truth, predicted = np.random.default_rng(0).integers(0, [[4], [5]], (2, 200))
    found = scene_metrics(truth, predicted, CLASSES)
    for average in ("micro", "macro", "weighted"):
        own = metrics.f1_score(truth, predicted, labels=range(10), average=average, zero_division=0)
        assert found[f"f1_{average}", "all"] == pytest.approx(own)
    own = metrics.f1_score(truth, predicted, labels=range(10), average=None, zero_division=0)
    assert [found["f1", c] for c in CLASSES] == pytest.approx(own)


def test_linear_heads_are_the_minima():
    torch.manual_seed(0)
    x = torch.randn(150, 12) @ torch.randn(12, 12) * 3 + 5
    labels = (x @ torch.randn(12, 4) + 4 * torch.randn(150, 4)).argmax(1)
    targets, axes = F.one_hot(labels, 4).float(), principal_axes(x)
    z = (x - x.mean(0)) / x.std(0)
    for penalty, head in linear_heads(x, targets, axes, "softmax"):
        own = (
            LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)
            .fit(z.numpy(), labels.numpy())
            .predict_proba(z.numpy())
        )
        assert np.abs(own - probabilities(head(x), "softmax").numpy()).max() < 0.02
    soft = torch.softmax(torch.randn(150, 4), 1)
    for penalty, head in linear_heads(x, soft, axes, "bce"):
        weight, bias = head.weight, head.bias
        w, b = (weight * x.std(0)).requires_grad_(), (bias + weight @ x.mean(0)).requires_grad_()
        loss = (
            F.binary_cross_entropy_with_logits(F.linear(z, w, b), soft) * 4 + penalty / 300 * w.square().sum()
        )
        assert max(g.abs().max() for g in torch.autograd.grad(loss, [w, b])) < 5e-3


def test_predictions_are_on_the_simplex():
    logits = 30 * torch.randn(50, 10)
    for loss in ("softmax", "bce"):
        p = probabilities(logits, loss)
        assert (p >= 0).all() and torch.allclose(p.sum(1), torch.ones(50))
    assert torch.allclose(
        probabilities(torch.tensor([[0.0, 0.0, 20]]), "bce"), torch.tensor([[0.25, 0.25, 0.5]]), atol=1e-6
    )


def test_nearest_neighbours():
    bank = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3]])
    assert nearest(bank, torch.tensor([[9.0, 0.4], [0.1, 9]]), 2).tolist() == [[1, 0], [2, 3]]
    assert nearest(bank, bank, 20).shape == (4, 4)
    assert nearest(bank, bank.repeat(300, 1), 1).shape == (1200, 1)
    rng = np.random.default_rng(0)
    bank, queries, labels = rng.normal(size=(80, 6)), rng.normal(size=(40, 6)), rng.integers(0, 4, 80)
    own = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(bank, labels)
    rows = nearest(torch.from_numpy(bank), torch.from_numpy(queries), 20)[:, :5]
    assert (rows.numpy() == own.kneighbors(queries, return_distance=False)).all()
    assert (torch.eye(4)[labels][rows].sum(1).argmax(1).numpy() == own.predict(queries)).all()


# results.csv


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_metric_without_a_number_is_printed():
    """R2 of one test image; the table has no best of it."""
    rows = lines({(0, 1): 0.5}, "test") + lines({(0, 1): float("nan")}, "test", "r2")
    assert "nan" in table(pd.DataFrame(rows), "fraction")


def test_the_best_on_test_is_bold_on_a_terminal_and_the_fewest_seeds_are_told(monkeypatch):
    rows = []
    for metric in ("rmse", "mae", "r2"):
        few, many = lines({(0, 1): 0.1}, "test", metric), lines({(0, 1): 0.3, (1, 1): 0.3}, "test", metric)
        rows += [line | {"init": "few"} for line in few] + [line | {"init": "many"} for line in many]
        rows += [line | {"init": "few"} for line in lines({(0, 1): 0.5}, metric=metric)]
    title, _, *plain = table(pd.DataFrame(rows), "fraction").splitlines()
    assert title.endswith("over at least 1 seed") and "\033" not in "".join(plain)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bold = [line.split("\033[1m")[1:] for line in table(pd.DataFrame(rows), "fraction").splitlines()[2:]]
    assert [len(cells) for cells in bold] == [2, 1], "of both errors the smaller, of R2 the larger"
    assert [line.split()[2] for line in plain] == ["0.1000", "0.3000"]


def test_long_names_are_told_apart():
    rows = [
        line | {"init": f"simclr-{seed}-of-long-names"}
        for seed in (1, 2)
        for line in lines({(0, 1): 0.1 * seed}, "test")
    ]
    _, head, *cells = table(pd.DataFrame(rows), "fraction").splitlines()
    assert [line.split()[0] for line in cells] == [f"simclr-{seed}-of-long-names" for seed in (1, 2)]
    assert {len(line) for line in cells} == {len(head)}


def test_seeds_that_draw_nothing_have_no_spread():
    rows = pd.DataFrame(lines({(seed, 1): 0.56 for seed in range(3)}, "test"))
    found = summarise(rows).iloc[0]
    assert (found["mean"], found["std"], found.n) == (0.56, 0, 3)
    assert "0.5600" in table(rows, "fraction") and "± 0.0000" not in table(rows, "fraction")


def test_names_in_another_encoding_are_written_and_read(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    rows = pd.DataFrame([line | {"class": name} for line in lines({(0, 1): 0.5})], columns=COLUMNS)
    Results(tmp_path).add(("a",), rows)
    assert Results(tmp_path).read()["class"].tolist() == [name]
    assert b"caf\xe9" in (tmp_path / "results.csv").read_bytes()


def test_a_claim_is_exclusive_and_ends_with_its_process(tmp_path):
    def child(name, act):
        if not (pid := os.fork()):
            with Results(tmp_path).claim(name, wait=False) as mine:
                os._exit(act(mine))
        return pid

    def answer(name):
        return os.waitstatus_to_exitcode(os.waitpid(child(name, int), 0)[1])

    with Results(tmp_path).claim("cell"):
        assert answer("cell") == 0 and answer("another cell") == 1
    assert answer("cell") == 1
    reader, writer = os.pipe()
    holder = child("cell", lambda mine: os.write(writer, b"!") and time.sleep(60) or 0)
    os.read(reader, 1)
    assert answer("cell") == 0
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert answer("cell") == 1


@pytest.mark.parametrize("name", ["results.csv", "summary.csv"])
def test_a_table_is_written_by_one_process_at_a_time(tmp_path, name):
    """A row that another adds in between would be lost."""
    results, (reader, writer) = Results(tmp_path), os.pipe()
    if not (pid := os.fork()):
        with Results(tmp_path).claim(name):
            os.write(writer, b"!")
            time.sleep(0.3)
            os._exit((tmp_path / name).exists())
    os.read(reader, 1)
    results.add(("a",), pd.DataFrame(lines({(0, 1): 0.5}), columns=COLUMNS))
    results.write_summary()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and (tmp_path / name).exists()


CELL_OF = {"task": "fraction", "data": "land", "init": "random", "mode": "finetune"}
TRAINED = {"lr": "0.01", "momentum": "0.9", "weight_decay": "0.0001", "epochs": "3", "batch_size": "64"}


def lines(values: dict[tuple[int, int], float], split="val", metric="rmse") -> list[dict]:
    """Rows of results.csv from (seed, epoch) -> value."""
    rows = []
    for (seed, epoch), value in values.items():
        result = {"epoch": str(epoch), "split": split, "metric": metric, "class": "all", "value": str(value)}
        found = {"images": "9", "seconds": "1.00", "commit": "abc"}
        rows.append(CELL_OF | {"ratio": "0.1", "seed": str(seed)} | result | TRAINED | found)
    return rows


def test_the_chosen_epoch_is_the_best_mean_over_the_seeds():
    val = {(0, 1): 0.5, (0, 2): 0.2, (0, 3): 0.1, (1, 1): 0.1, (1, 2): 0.2, (1, 3): 0.4}
    frame = pd.DataFrame([{"seed": s, "epoch": e, "value": v} for (s, e), v in val.items()])
    assert choose_epoch(frame, -1) == 2 and choose_epoch(frame, +1) == 1  # at 1: .3, at 2: .2, at 3: .25
    assert choose_epoch(frame.assign(value=0.5), -1) == 1, "the earliest of equals"
    missing = frame.drop(index=4)  # seed 1 has no epoch 2
    assert choose_epoch(missing, -1) == 3
    assert choose_epoch(frame[[True, False, False, False, True, False]], -1) is None


def test_summary_of_a_common_epoch_and_of_each_seeds_own():
    val = lines({(0, 1): 0.5, (0, 2): 0.2, (1, 1): 0.1, (1, 2): 0.2})
    test = lines({(0, 1): 0.9, (0, 2): 0.6, (1, 1): 0.8, (1, 2): 0.4}, "test")
    found = summarise(pd.DataFrame(val + test, columns=COLUMNS)).set_index("split")
    assert found.epoch.tolist() == [2, 2] and found.n.tolist() == [2, 2]
    assert found["mean"].to_dict() == pytest.approx({"val": 0.2, "test": 0.5})
    assert found["std"]["test"] == pytest.approx(0.1 * 2**0.5)
    assert found.ratio.tolist() == ["0.1", "0.1"] and found.lr.tolist() == ["0.01", "0.01"]
    own = lines({(0, 3): 0.3, (1, 7): 0.5}) + lines({(0, 3): 0.4, (1, 7): 0.6}, "test")
    found = summarise(pd.DataFrame(own, columns=COLUMNS)).set_index("split")
    assert found.epoch.tolist() == ["", ""] and found["mean"]["test"] == pytest.approx(0.5)


def test_neither_other_metrics_nor_single_classes_choose_the_epoch_or_count_in_a_mean():
    val = {(0, 1): 0.2, (0, 2): 0.4}  # epoch 1 has the smaller error
    rows = lines(val) + lines(val, "test")
    others = lines({(0, 1): 0.9, (0, 2): 0.1})
    others += [line | {"split": "test"} for line in others] + lines(val, metric="mae")
    rows += [line | {"class": "Water"} if line["metric"] == "rmse" else line for line in others]
    found = summarise(pd.DataFrame(rows, columns=COLUMNS)).set_index(["split", "metric"])
    assert found.epoch.tolist() == [1] * 3 and found.n.tolist() == [1] * 3
    assert found["mean"].to_dict() == {
        (s, m): 0.2 for s, m in [("val", "rmse"), ("val", "mae"), ("test", "rmse")]
    }


def test_ratios_by_their_names_and_in_their_order():
    ratios = ["100", "5", "50/class", "0.5", "10/class"]
    assert sorted(ratios, key=ratio_rank) == ["10/class", "50/class", "0.5", "5", "100"]
    assert [ratio_name(r) for r in ("10/class", "0.5", 33.25)] == ["10/class", "0.5 %", "33.25 %"]


@pytest.mark.parametrize("number", [0, 5, 20240101, 2**31, 0.1, 33.333333, 1e-7, 12345678.9])
def test_numbers_survive_as_text(number):
    assert float(exact(number)) == number and "e+" not in exact(number)


def test_a_cut_cell_is_not_done_and_is_written_again(tmp_path):
    results = Results(tmp_path)
    cells = {seed: pd.DataFrame(lines({(seed, 1): 0.1, (seed, 2): 0.2}), columns=COLUMNS) for seed in (1, 2)}
    keys = {seed: results.keys(rows).iloc[0] for seed, rows in cells.items()}
    for seed, rows in cells.items():
        results.add(keys[seed], rows)
    wanted = dict.fromkeys(keys.values(), 2)
    whole = results.file.read_bytes()
    assert results.done(wanted) == set(keys.values())
    end_of_first = len(b"".join(whole.splitlines(keepends=True)[:3]))
    cuts = (0, 20, end_of_first - 4, end_of_first + 9, len(whole) - 2, len(whole) - 1)
    for length in {*range(0, len(whole), 9), *cuts}:
        results.file.write_bytes(whole[:length])
        done = results.done(wanted)
        assert done == ({keys[1]} if length >= end_of_first else set())
        if length in cuts:
            for seed in (1, 2):
                if keys[seed] not in done:
                    results.add(keys[seed], cells[seed])
            assert results.file.read_bytes() == whole


def test_a_table_is_read_again_only_where_it_has_changed(tmp_path, monkeypatch):
    """A long one takes a second, and each of its cells asks."""
    reads, read = [], Results.read
    monkeypatch.setattr(Results, "read", lambda self: reads.append(self) or read(self))
    mine, other = Results(tmp_path), Results(tmp_path)
    rows = {seed: pd.DataFrame(lines({(seed, 1): 0.1}), columns=COLUMNS) for seed in (1, 2)}
    keys = {seed: mine.keys(part).iloc[0] for seed, part in rows.items()}
    wanted = dict.fromkeys(keys.values(), 1)
    for seed in (1, 2):
        (mine, other)[seed - 1].add(keys[seed], rows[seed])
        reads.clear()
        for _ in range(3):
            assert mine.done(wanted) == {keys[1], keys[seed]}
        assert len(reads) == 1


def test_a_table_that_holds_rows_twice_is_summed_up_once(tmp_path):
    """As where the tables of two machines were appended: the last of equal rows counts."""
    results = Results(tmp_path)
    rows = pd.DataFrame(lines({(1, 1): 0.1, (2, 1): 0.3}), columns=COLUMNS)
    for values in (rows, rows.assign(value="0.5")):
        results.add(results.keys(rows).iloc[0], values)
    assert len(results.read()) == len(rows)
    results.write_summary()
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert set(summary["mean"]) == {0.5} and (summary.n == 2).all()


@pytest.mark.parametrize("epoch, whole", [("1.0", True), ("1.5", False), ("inf", False), ("1e0", True)])
def test_epochs_as_spreadsheets_write_them(tmp_path, epoch, whole):
    results = Results(tmp_path)
    rows = pd.DataFrame(lines({(1, 1): 0.1}), columns=COLUMNS)
    results.add(results.keys(rows).iloc[0], rows.assign(epoch=epoch))
    assert (len(results.read()) == len(rows)) == whole
    results.write_summary()
    assert set(pd.read_csv(tmp_path / "summary.csv").epoch) == ({1} if whole else set())


def test_a_cell_is_known_by_its_numbers_however_a_spreadsheet_writes_them(tmp_path):
    results = Results(tmp_path)
    rows = pd.DataFrame(lines({(1, 1): 0.1}), columns=COLUMNS).assign(weight_decay="1e-05", lr="0.01")
    key = results.keys(rows).iloc[0]
    results.add(key, rows.assign(weight_decay="1.00E-05", lr="1E-2", seed="1.0"))
    assert results.done({key: len(rows)}) == {key}


@pytest.mark.parametrize("value", ["548441", "-0.5", "54,8"])
def test_a_cell_with_an_impossible_value_is_done_again(tmp_path, value):
    results = Results(tmp_path)
    rows = pd.DataFrame(lines({(1, 1): 0.1, (1, 2): 0.2}), columns=COLUMNS)
    key = results.keys(rows).iloc[0]
    changed = rows.copy()
    changed.loc[changed.index[0], "value"] = value
    results.add(key, changed)
    assert not results.done({key: len(rows)})
    results.add(key, rows)
    assert results.done({key: len(rows)}) == {key} and set(results.read().value) == set(rows.value)


def test_an_r2_below_zero_is_a_value_and_so_is_none(tmp_path):
    """Worse than the mean of the truth; of one test image there is none."""
    results = Results(tmp_path)
    rows = pd.DataFrame(lines({(1, 1): -0.5, (1, 2): float("nan")}, metric="r2"), columns=COLUMNS)
    key = results.keys(rows).iloc[0]
    results.add(key, rows)
    assert results.done({key: 2}) == {key} and results.read().value.tolist() == ["-0.5", "nan"]


@pytest.mark.parametrize("of", ["every line", "one line"])
def test_lines_longer_than_the_first_are_refused_and_kept(tmp_path, of):
    """As decimal commas without quotes make them: each field would stand in its neighbour's column."""
    results = Results(tmp_path)
    rows = pd.DataFrame(lines({(1, 1): 0.1, (2, 1): 0.3}), columns=COLUMNS)
    results.add(results.keys(rows).iloc[0], rows)
    text = results.file.read_text()
    changed = text.replace(",0.3,", ",0,3,")
    results.file.write_text(changed.replace(",0.1,", ",0,1,") if of == "every line" else changed)
    before = results.file.read_bytes()
    with pytest.raises(ConfigError, match="not a readable CSV .* move it away"):
        Results(tmp_path)
    assert results.file.read_bytes() == before != text.encode()


@pytest.mark.parametrize("text", ["fraction linear:\n", "- 1\n", "a: {b: [\n", "a: 3\n", "\0"])
def test_damaged_settings_are_named(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError, match="settings.yaml: damaged"):
        Results(tmp_path).check_settings({"fraction linear": {"size": 64}})


def test_names_that_a_spreadsheet_would_compute_are_quoted(tmp_path):
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", "Wood", "-"]
    write_confusion(tmp_path / "confusion" / "c.csv", np.arange(6), np.arange(6), names)
    table = pd.read_csv(tmp_path / "confusion" / "c.csv", index_col=0)
    assert list(table) == list(table.index) == ["'=HYPERLINK(1)", "'+1", "'-1", "'@x", "Wood", "'-"]
    assert (table.to_numpy() == np.eye(6)).all()


def test_heads_do_not_depend_on_the_scale_of_features():
    torch.manual_seed(0)
    x = torch.randn(200, 8) @ torch.randn(8, 8) + 3
    targets = F.one_hot((x @ torch.randn(8, 3)).argmax(1), 3).float()
    accuracy = {}
    for scale in (1.0, 1e-9, 1e6):
        *_, (_, head) = linear_heads(scale * x, targets, principal_axes(scale * x), "softmax")
        accuracy[scale] = (head(scale * x).argmax(1) == targets.argmax(1)).float().mean().item()
    assert min(accuracy.values()) > 0.97, accuracy
    nearly_constant = 1 + 1e-4 * x  # as a collapsed backbone's
    *_, (_, head) = linear_heads(nearly_constant, targets, principal_axes(nearly_constant), "softmax")
    assert (head(nearly_constant).argmax(1) == targets.argmax(1)).float().mean() > 0.97
    lacking = torch.cat([targets, torch.zeros(200, 1)], 1)  # a class that no training image has
    for loss in ("softmax", "bce"):
        *_, (_, head) = linear_heads(x, lacking, principal_axes(x), loss)
        assert (head(x).argmax(1) == targets.argmax(1)).float().mean() > 0.9
    dead = torch.cat([x, torch.full((200, 1), 0.7), torch.zeros(200, 1)], 1)
    assert all(h.weight.isfinite().all() for _, h in linear_heads(dead, targets, principal_axes(dead), "bce"))


def test_a_confusion_has_the_true_classes_in_its_rows(tmp_path):
    write_confusion(tmp_path / "c.csv", np.array([0, 0, 1]), np.array([1, 1, 1]), ["x", "y", "none"])
    table = pd.read_csv(tmp_path / "c.csv", index_col=0)
    assert table.loc["x"].tolist() == [0, 2, 0] and table.loc["y"].tolist() == [0, 1, 0]
    assert table.loc["none"].tolist() == [0, 0, 0], "a class that the test images lack"


def test_an_end_while_embeddings_are_written_leaves_the_old_ones(tmp_path):
    class Ends:
        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    for labels in (np.zeros(3), Ends()):
        with contextlib.suppress(KeyboardInterrupt):
            write_embeddings(tmp_path / "e.npz", np.ones((3, 2)), labels, ["x"], "data", "random")
    assert np.load(tmp_path / "e.npz")["labels"].tolist() == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["e.npz"]
