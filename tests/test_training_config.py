"""The configuration: recipes' defaults, suggestions for misspelt names, limits in messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.options import option_fields
from clipkit.training.config import RECIPES, TrainConfig, method_and_loss_options


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_all_defaults(recipe: str) -> None:
    config = TrainConfig.from_mapping({"data": "d", "recipe": recipe})
    assert config.recipe == recipe
    assert config.learning_rate == RECIPES[recipe]["learning_rate"]


def test_every_option_says_what_it_is() -> None:
    every = {**option_fields(TrainConfig), **method_and_loss_options()}
    assert all(item.metadata["help"] for item, _ in every.values())


def test_a_config_survives_json() -> None:
    config = TrainConfig.from_mapping(
        {"data": "d", "recipe": "lora", "warmup": 0.25, "hardness": 1}
    )
    assert config.options == {"hardness": 1.0} and config.loss_options("infonce")["hardness"] == 1
    assert TrainConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


def test_flags_override_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('data = "mine"\nrecipe = "full"\nepochs = 3\nclip_norm = 2\n')
    config = TrainConfig.from_toml(path, {"epochs": 4, "data": Path("other")})
    assert (config.data, config.recipe, config.epochs) == ("other", "full", 4)
    assert config.clip_norm == 2.0 and isinstance(config.clip_norm, float)
    assert config.layer_decay == 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ({"zzzz": 1}, "unknown key 'zzzz'; the keys are data, out"),
        ({"recipe": "lorra"}, "recipe is 'lorra'; did you mean 'lora'?"),
        ({"recipe": ["x"]}, "use one of heads, lit, lora, full"),
        ({"batch": 1.5}, "batch is 1.5; it must be a whole number"),
        ({"batch": True}, "batch is True; it must be a whole number"),
        ({"flip": 1}, "flip is 1; it must be true or false"),
        ({"warmup": 1.0}, "warmup is 1.0; it must be at least 0 and below 1"),
        ({"warmup": float("nan")}, "warmup is nan"),
        ({"learning_rate": 0}, "learning_rate is 0.0; it must be above 0 and at most 1"),
        ({"drift": -0.5}, "drift is -0.5; it must be 0 or more, or -1 to be fitted"),
        ({"drift": -2}, "drift is -2.0; it must be at least -1"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"loss": "xyz"}, "loss is 'xyz'; use one of auto, infonce, siglip"),
        ({"loss": "sigclip"}, "loss is 'sigclip'; did you mean 'siglip'?"),
        ({"loss": "siglip", "hardness": 0.5}, "loss siglip has no such option.*use loss infonce"),
        ({"data": 3}, "data is 3; it must be a text"),
        ({"method": "pair"}, "method is 'pair'; did you mean 'pairs'?"),
        ({"hardness": -1}, "hardness is -1.0; it must be at least 0"),
        ({"duplicates": "x"}, "duplicates is 'x'; use one of mask, positive"),
        (
            {"crop": 0.7},
            "crop is 0.7, but recipe heads does not use it.*recipe lit or lora or full",
        ),
        ({"recipe": "full", "lora_rank": 4}, "recipe full does not use it"),
    ],
)
def test_invalid_options_are_refused_with_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        TrainConfig.from_mapping({"data": "d", **options})


def test_a_missing_dataset_is_refused() -> None:
    with pytest.raises(InputError, match="data is not given"):
        TrainConfig.from_mapping({})


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.toml: No such file"):
        TrainConfig.from_toml(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("data = \n")
    with pytest.raises(InputError, match=r"bad\.toml is not TOML: .*line 1"):
        TrainConfig.from_toml(path)
    path.write_text('data = "d"\nepoch = 3\n')
    with pytest.raises(InputError, match=r"bad\.toml: unknown key 'epoch'; did you mean 'epochs'"):
        TrainConfig.from_toml(path)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(
    st.dictionaries(
        st.sampled_from([*option_fields(TrainConfig), *method_and_loss_options()]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)
def test_any_value_gives_a_config_or_a_sentence(options: dict[str, Any]) -> None:
    try:
        TrainConfig.from_mapping(options)
    except InputError as error:
        assert str(error)
