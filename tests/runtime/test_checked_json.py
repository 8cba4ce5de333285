"""JSON from files: types and values are checked before anything uses them."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from tiny_model import contract

from d2zero.model import ModelConfig
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.contract import ModelContract, embeddings_from_json
from d2zero_runtime.checked_json import checked
from d2zero_runtime.images import Preprocessing

ODD: list[Any] = [None, True, -1, 2**63, 1e30, float("nan"), "", "x", [], {}, [None]]
WRITTEN = asdict(contract())


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("field", [*WRITTEN, *(f"preprocessing.{name}" for name in WRITTEN["preprocessing"])])
def test_a_contract_with_an_odd_value_is_refused_or_means_it(field: str, value: Any) -> None:
    changed = json.loads(contract().to_json())
    *path, last = field.split(".")
    (changed[path[0]] if path else changed)[last] = value
    try:
        found = ModelContract.from_json(json.dumps(changed), "m.onnx")
    except D2ZeroError as error:
        assert str(error).startswith(("m.onnx", "unknown preprocessing")) and "\n" not in str(error)
    else:
        read = json.loads(found.to_json())
        assert (read[path[0]] if path else read)[last] == (None if (field, value) == ("end_to_end", {}) else value)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "1", "{", "[" * 100_000, "1" * 6000, '{"version": "x"}', '{"version": [1]}']
)
def test_what_is_no_contract_is_named(text: str) -> None:
    with pytest.raises(D2ZeroError, match=r"^m\.onnx(: the model contract| is damaged: the version)"):
        ModelContract.from_json(text, "m.onnx")


@pytest.mark.parametrize(
    "changes",
    [
        {"std": [0, 1, 1]},
        {"mean": [float("nan"), 0, 0]},
        {"mean": [1, 2]},
        {"longest_edge": 10**6},
        {"size_divisor": 7},
        {"size_divisor": 10**6},
        {"static_size": [0, 32]},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_used_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(D2ZeroError):
        checked(Preprocessing, {**asdict(Preprocessing()), **changes}, "preprocessing")


def test_a_static_size_is_read_by_its_earlier_name() -> None:
    now = contract(preprocessing=Preprocessing(static_size=(64, 96)))
    assert ModelContract.from_json(now.to_json().replace("static_size", "canvas"), "m.onnx") == now
    config = ModelConfig(preprocessing=now.preprocessing)
    earlier = json.loads(json.dumps(config.to_dict()).replace("static_size", "canvas"))
    assert ModelConfig.from_dict(earlier) == config and config.preprocessing.canvas == (64, 96)


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_temperature": float("nan")},
        {"softmax_temperature": 0},
        {"logit_scale": float("inf")},
        {"decoder_ffn_dim": 0},
        {"adaptation_dropout": 2},
        {"num_queries": "100"},
        {"backbone": None},
        {"preprocessing": []},
    ],
    ids=str,
)
def test_configurations_that_cannot_be_used_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(D2ZeroError):
        ModelConfig.from_dict({**ModelConfig().to_dict(), **changes})


@pytest.mark.parametrize(
    "values",
    [
        {},
        None,
        {"shape": [1, 2], "float32": "!"},
        {"shape": [1, 2], "float32": "AAAA"},
        {"shape": [0, 0], "float32": ""},
        {"shape": [1, 2.5], "float32": ""},
        {"shape": "12", "float32": ""},
    ],
    ids=str,
)
def test_damaged_embeddings_are_refused(values: object) -> None:
    with pytest.raises(D2ZeroError, match=r"^here(: class embeddings (is damaged|lacks)| is damaged: )"):
        embeddings_from_json(values, "here")
