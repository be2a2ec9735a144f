"""`jdetune leak audit` on a bank and an adapter that were written to disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jdetune.cli import main as program
from jdetune.errors import InputError
from jdetune.leak import recogniser, tuning
from jdetune.leak.audit import load_for
from jdetune.leak.bank import Bank, load_bank, save_adapter, save_bank
from tests.leak.tiny import PARAMS, PUBLIC, RECIPE, SIZE, pictures, private

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def bank():
    own = private(6)
    lora = tuning.fine_tune(RECIPE, SIZE, PARAMS, PUBLIC, own, KEY, at_once=2)
    judge = recogniser.Judge(steps=2, batch=4)
    shown = pictures(4, 9)[:, None]
    network = recogniser.train(judge, shown, KEY)
    return Bank(
        SIZE, PARAMS, lora, np.asarray(own.pictures).mean(axis=1), np.array([0, 1, 0, 1, 0, 1]),
        np.array([1, 2, 3, 1, 2, 3]), recogniser.gallery(network, shown), np.zeros(4, int),
        pictures(1)[0], network,
        {"classes": ["a\x1b[2J", "b"], "measured": {"regression": 0.5}},
    )  # fmt: skip


@pytest.fixture
def written(bank, tmp_path):
    save_bank(tmp_path / "bank", bank)
    one = jax.tree.map(lambda x: x[2], bank.lora)
    save_adapter(tmp_path / "adapter", one)
    np.save(tmp_path / "own.npy", bank.targets[2:3])
    return tmp_path


def call(capsys, *argv):
    capsys.readouterr()
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_bank_comes_back_as_it_was(bank, written):
    again = load_bank(written / "bank")
    assert again.size == bank.size
    assert again.about == bank.about
    for name in ("targets", "classes", "counts", "gallery", "usual"):
        np.testing.assert_array_equal(getattr(again, name), getattr(bank, name))
    for ours, theirs in ((again.lora, bank.lora), (again.params, bank.params)):
        jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(theirs))
    shown = pictures(3, 2)
    np.testing.assert_array_equal(
        recogniser.embed(again.network, shown), recogniser.embed(bank.network, shown)
    )


def test_report_as_json_and_for_people(capsys, written):
    out = written / "seen.npy"
    words = ("leak", "audit", written / "adapter", f"--bank={written / 'bank'}")
    code, text, _ = call(
        capsys, *words, f"--pictures={written / 'own.npy'}", f"--out={out}", "--json"
    )
    assert code == 0
    value = json.loads(text)
    assert set(value["attacks"]) == {"regression", "without a prompt"}
    assert value["candidates"] == 5
    assert value["count"] == 3  # the adapter is in the bank itself
    assert value["attacks"]["regression"]["rank"] in range(1, 6)
    assert value["identified"] == any(s["rank"] == 1 for s in value["attacks"].values())
    assert np.load(out).shape == (2, 8, 8)
    code, text, _ = call(capsys, *words)
    assert code == 0
    assert "not judged: give --pictures" in text
    assert "\x1b" not in text


def test_an_adapter_of_the_bank_itself_is_drawn_as_its_picture(bank, written):
    """The regression nearly interpolates: the oracle is the bank's own target."""
    from jdetune.leak import ridge
    from jdetune.leak.updates import products

    every = np.asarray(products(bank.lora))
    flat = bank.targets.reshape(6, -1)
    fitted = dataclasses.replace(ridge.fit(every, flat))
    guess = ridge.predict(fitted, every[2:3])
    assert np.corrcoef(guess[0], flat[2])[0, 1] > np.corrcoef(guess[0], flat[3])[0, 1]


def test_wrong_use_and_bad_input_have_their_exit_codes(capsys, written, bank):
    adapter, at = written / "adapter", f"--bank={written / 'bank'}"
    assert call(capsys, "leak", "audit", adapter)[0] == 2
    assert call(capsys, "leak", adapter, at)[0] == 2
    assert call(capsys, "leak", "audit", adapter, at, "--out=x.png")[0] == 2
    assert call(capsys, "leak", "audit", written, at)[0] == 3
    assert call(capsys, "leak", "audit", adapter, f"--bank={written}")[0] == 3
    (written / "no.npy").write_text("no array")
    for name, array in {"wide": np.zeros((1, 9, 9)), "far": np.full((1, 8, 8), 3.0)}.items():
        np.save(written / f"{name}.npy", array)
    for name in ("no", "wide", "far", "missing"):
        code, _, error = call(
            capsys, "leak", "audit", adapter, at, f"--pictures={written / name}.npy"
        )
        assert code == 3, name
        assert f"{name}.npy" in error
    assert "leak" in program.usage()


def test_an_adapter_of_other_layers_or_shapes_is_refused(bank, written):
    one = jax.tree.map(lambda x: x[0], bank.lora)
    name, pair = next(iter(one.items()))
    save_adapter(written / "few", {name: pair})
    with pytest.raises(InputError, match="it adapts"):
        load_for(bank, written / "few")
    wide = dict(one) | {name: dataclasses.replace(pair, a=np.zeros((2, 9), np.float32))}
    save_adapter(written / "wide", wide)
    with pytest.raises(InputError, match="8x9, the bank's base has"):
        load_for(bank, written / "wide")


def test_a_damaged_bank_is_refused(written):
    said = json.loads((written / "bank" / "bank.json").read_text())
    for change in ({"format": "x"}, {"size": {"no": 1}}, {"scalings": {"no.q": 1.0}}):
        (written / "bank" / "bank.json").write_text(json.dumps(said | change))
        with pytest.raises(InputError, match="Make it again"):
            load_bank(written / "bank")
