"""Names, fingerprints and the recorded pairs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.verifier_cards import write_card
from safetensors.numpy import save_file

from quasar_core import store
from quasar_core.config import LoadOptions, QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.load_pair import asked_pair, find_pair_files, known_verifier
from quasar_core.store import PairRecord, pairs

CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 10000.0}


def _weights() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {name: numbers.normal(size=(40, 40)).astype(np.float32) for name in ("a.weight", "b.weight", "c.weight")}


def _save(folder: Path, config: dict | None = None, weights: dict[str, np.ndarray] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    save_file(weights or _weights(), folder / "model.safetensors")
    return folder


def _save_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items()))))
    weights, files = _weights(), {}
    for number, name in enumerate(reversed(weights)):
        files[name] = f"model-{number}.safetensors"
        save_file({name: weights[name]}, folder / files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# Names


def test_a_folder_is_found_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _save(tmp_path / "here" / "tiny")
    source = store.resolve_model("tiny")
    assert (source.folder, source.kind, source.label) == (folder, "folder", "tiny")
    monkeypatch.chdir(tmp_path)
    assert store.resolve_model(source.name) == source


def test_a_folder_of_that_name_comes_before_an_organisation(tmp_path: Path) -> None:
    assert store.full_name("Qwen3-8B") == "Qwen/Qwen3-8B"
    folder = _save(tmp_path / "here" / "Qwen3-8B")
    assert store.full_name("Qwen3-8B") == str(folder)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("demo", "demo"),
        ("org/name", "org/name"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B"),
        ("openPangu-Embedded-7B", "FreedomIntelligence/openPangu-Embedded-7B"),
    ],
)
def test_what_a_name_stands_for(name: str, full: str) -> None:
    assert store.full_name(name) == full


@pytest.mark.parametrize("name", ["", "  ", "nobody-knows-it", "./Qwen3-8B", "/no/such/folder", "a/b/c", "../x"])
def test_a_name_that_means_nothing_is_wrong_usage(name: str) -> None:
    with pytest.raises(UsageError):
        store.full_name(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "here" / "model.bin").write_bytes(b"weights")
    with pytest.raises(UsageError, match="is a file"):
        store.full_name("model.bin")


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _with_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _with_index_only(folder: Path) -> None:
    index = {"weight_map": {"a.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_config, "no config.json"),
        (_without_weights, r"no \*.safetensors"),
        (_with_pickles, "only pickled weights"),
        (_with_index_only, "incomplete: its index names model-1.safetensors"),
    ],
)
def test_a_folder_that_holds_no_model(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(_save(tmp_path / "model"))
    with pytest.raises(QuasarError, match=words):
        store.resolve_model(str(tmp_path / "model"))


def test_where_the_verifier_goes(tmp_path: Path) -> None:
    folder = _save(tmp_path / "models" / "X")
    config = QuantizeConfig()
    beside = store.default_output(store.resolve_model(str(folder)), config)
    assert beside == tmp_path / "models" / "X-gptq-4bit-g128"
    verifiers = tmp_path / "home" / "verifiers"
    hub = store.ModelSource("Qwen/Qwen3-8B", folder, "hub")
    assert store.default_output(hub, config) == verifiers / "Qwen--Qwen3-8B-gptq-4bit-g128"
    demo = store.ModelSource("demo", folder, "demo")
    assert store.default_output(demo, QuantizeConfig(bits=8, group_size=-1)) == verifiers / "demo-gptq-8bit-gchannel"


# Fingerprints


def test_sharding_and_key_order_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    assert store.fingerprint(_save(tmp_path / "one")) == store.fingerprint(_save_sharded(tmp_path / "three"))


def test_who_saved_the_config_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    saved_again = {**CONFIG, "transformers_version": "5.5.0", "dtype": "float32"}
    assert store.fingerprint(_save(tmp_path / "a")) == store.fingerprint(_save(tmp_path / "b", saved_again))


def _changed(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return _weights() | {name.replace("_", "."): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({**CONFIG, "rope_theta": 500.0}, None),
        (CONFIG, _changed(b_weight=_weights()["b.weight"] + 1)),
        (CONFIG, _changed(b_weight=_weights()["b.weight"].reshape(20, 80))),
        (CONFIG, _changed(b_weight=_weights()["b.weight"].view(np.int32))),
        (CONFIG, _changed(d_weight=np.zeros(3, np.float32))),
    ],
    ids=["config", "values", "shape", "dtype", "one more"],
)
def test_what_changes_the_fingerprint(tmp_path: Path, config: dict, weights: dict[str, np.ndarray] | None) -> None:
    original = store.fingerprint(_save(tmp_path / "original"))
    assert store.fingerprint(_save(tmp_path / "other", config, weights)) != original


def test_a_small_change_in_the_middle_of_a_tensor_is_seen(tmp_path: Path) -> None:
    weights = _weights()
    weights["b.weight"][20, 0] += 1e-3
    assert store.fingerprint(_save(tmp_path / "a")) != store.fingerprint(_save(tmp_path / "b", weights=weights))


@pytest.mark.parametrize("data", [b"", b"\x05", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_a_broken_weight_file_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    folder = _save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(QuasarError, match=r"model\.safetensors is not a whole safetensors file \([^()]+\)\.$"):
        store.fingerprint(folder)


def test_a_weight_file_cut_short_is_one_sentence(tmp_path: Path) -> None:
    file = _save(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(QuasarError, match="not a whole safetensors file"):
        store.fingerprint(tmp_path / "model")


# Pairs


def _verifier(tmp_path: Path, *parents: str) -> Path:
    folder = tmp_path.joinpath(*parents, "demo-gptq-4bit-g128")
    folder.mkdir(parents=True)
    write_card(folder)
    return folder


def test_without_a_record_there_is_no_pair() -> None:
    assert store.list_pairs() == []
    assert store.current_pair() is None


def test_a_recorded_pair_is_the_current_one(tmp_path: Path) -> None:
    verifier = _verifier(tmp_path)
    record = store.record_pair("demo", verifier)
    assert record == PairRecord("demo-gptq-4bit-g128", "demo", str(verifier))
    assert store.current_pair() == record
    assert store.list_pairs() == [record]


def test_recording_the_same_verifier_again_replaces_it(tmp_path: Path) -> None:
    verifier = _verifier(tmp_path)
    store.record_pair("demo", verifier)
    again = store.record_pair("org/name", verifier)
    assert store.list_pairs() == [again]


def test_equal_folder_names_get_a_number_and_use_switches(tmp_path: Path) -> None:
    first = store.record_pair("demo", _verifier(tmp_path, "a"))
    second = store.record_pair("demo", _verifier(tmp_path, "b"))
    assert second.name == "demo-gptq-4bit-g128-2"
    assert store.current_pair() == second
    store.use_pair(first.name)
    assert store.current_pair() == first


def test_a_model_goes_with_the_current_pair_where_that_is_its_own(tmp_path: Path) -> None:
    first = store.record_pair("demo", _verifier(tmp_path, "a"))
    second = store.record_pair("demo", _verifier(tmp_path, "b"))
    store.use_pair(first.name)
    assert known_verifier(store.resolve_model("demo")) == Path(first.verifier)
    store.record_pair("org/name", _verifier(tmp_path, "c"))
    assert known_verifier(store.resolve_model("demo")) == Path(second.verifier)


def test_a_pairs_name_stands_for_its_model_and_verifier(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No pair is current"):
        asked_pair(None, None)
    first = store.record_pair("demo", _verifier(tmp_path, "a"), "small")
    second = store.record_pair("org/name", _verifier(tmp_path, "b"))
    assert asked_pair("small", None) == ("demo", first.verifier)
    assert asked_pair("small", "another") == ("demo", "another")
    assert asked_pair("large", None) == ("large", None)
    assert asked_pair(None, None) == ("org/name", second.verifier)


def test_a_model_that_was_moved_finds_its_verifier_and_its_pair_says_so(tmp_path: Path) -> None:
    before, verifier = _save(tmp_path / "before"), tmp_path / "elsewhere"
    verifier.mkdir()
    write_card(verifier, store.fingerprint(before))
    record = store.record_pair(str(before), verifier)
    other = _save(tmp_path / "other", weights={name: rows + 1 for name, rows in _weights().items()})
    now = before.rename(tmp_path / "now")
    assert known_verifier(store.resolve_model(str(now))) == verifier
    assert known_verifier(store.resolve_model(str(other))) is None
    for named in (None, record.name):
        with pytest.raises(UsageError, match=r"elsewhere is not at .*before any more: `quasar models add"):
            asked_pair(named, None)


def test_a_verifier_that_is_given_as_the_model_is_named_so(tmp_path: Path) -> None:
    folder = _save(tmp_path / "low", {**CONFIG, "num_attention_heads": 2})
    write_card(folder)
    with pytest.raises(UsageError, match="low is a verifier, not a model: give it with --verifier"):
        find_pair_files(LoadOptions(model=str(folder)))


def test_removing_a_pair_with_and_without_its_files(tmp_path: Path) -> None:
    kept, deleted = _verifier(tmp_path, "a"), _verifier(tmp_path, "b")
    first, second = store.record_pair("demo", kept), store.record_pair("demo", deleted)
    store.remove_pair(second.name, delete_files=True)
    assert not deleted.exists()
    assert store.current_pair() is None
    store.remove_pair(first.name, delete_files=False)
    assert kept.is_dir()
    assert store.list_pairs() == []


def test_a_folder_that_quasar_did_not_write_is_not_deleted(tmp_path: Path) -> None:
    folder = _verifier(tmp_path)
    (folder / "quasar.json").unlink()
    (folder / "notes.txt").touch()
    record = store.record_pair("demo", folder)
    with pytest.raises(QuasarError, match="not written by quasar"):
        store.remove_pair(record.name, delete_files=True)
    assert folder.is_dir()
    assert store.list_pairs() == [record]


@pytest.mark.parametrize("call", [store.use_pair, store.find_pair, lambda name: store.remove_pair(name, False)])
def test_an_unknown_pair_is_wrong_usage(tmp_path: Path, call: Callable[[str], object]) -> None:
    store.record_pair("demo", _verifier(tmp_path))
    with pytest.raises(UsageError, match="no pair other; the recorded pairs: demo-gptq-4bit-g128"):
        call("other")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not readable JSON (Expecting value in line 1, column 1)"),
        ("{", "is not readable JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "is damaged (pairs is missing): repair it"),
        ('{"pairs": [{"name": "x"}], "current": null}', "is damaged (pairs[0].target is missing): repair it"),
        ('{"pairs": {}, "current": null}', "is damaged (pairs must be a list, not an object)"),
        ('{"pairs": [], "pairs": [], "current": null}', "is not readable JSON (the key 'pairs' stands twice)"),
    ],
)
def test_a_damaged_registry_is_one_sentence(text: str, reason: str) -> None:
    store.home().mkdir()
    (store.home() / "pairs.json").write_text(text)
    with pytest.raises(QuasarError, match=re.escape(f"pairs.json {reason}")):
        store.list_pairs()


def test_a_registry_is_replaced_whole(tmp_path: Path) -> None:
    store.record_pair("demo", _verifier(tmp_path))
    assert sorted(path.name for path in store.home().iterdir()) == [".pairs.json.lock", "pairs.json"]


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(QuasarError, match=r"pairs\.json cannot be (read|written)"):
        store.record_pair("demo", _verifier(tmp_path))


def test_home_is_the_cache_folder_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.home() == tmp_path / "home"
    monkeypatch.delenv("QUASAR_HOME")
    assert store.home().name == "quasar"


def test_a_pair_that_is_not_there_is_said_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pairs, "locked", refuse)
    with pytest.raises(UsageError, match="There is no pair nobody; the recorded pairs: none"):
        store.use_pair("nobody")
