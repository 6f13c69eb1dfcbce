"""Prompt templates and class names: what ships, and what a person brings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipkit.errors import InputError
from eval.prompts import (
    Templates,
    default_templates,
    load_classes,
    load_templates,
)

# Sizes as published: OpenAI's prompts.md and ImageNet notebook, and each dataset's paper.
TEMPLATE_COUNTS = {
    "plain": 1, "simple": 7, "imagenet1k": 80, "cifar10": 18, "cifar100": 18, "food101": 1,
    "cars": 8, "fgvc_aircraft": 2, "dtd": 8, "pets": 1, "flowers": 1, "caltech101": 34,
    "eurosat": 3, "resisc45": 4, "stl10": 2, "gtsrb": 3, "mnist": 1, "sun397": 2, "voc2007": 1,
    "pcam": 2, "country211": 5,
}  # fmt: skip
CLASS_COUNTS = {
    "imagenet1k": 1000, "cifar10": 10, "cifar100": 100, "food101": 101, "dtd": 47, "pets": 37,
    "flowers": 102, "caltech101": 102, "eurosat": 10, "resisc45": 45, "stl10": 10, "gtsrb": 43,
    "mnist": 10, "svhn": 10, "voc2007": 20, "pcam": 2, "country211": 211, "fer2013": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TEMPLATE_COUNTS))
def test_the_shipped_templates(name: str) -> None:
    templates = load_templates(name)
    assert templates.name == name
    assert len(templates.texts) == TEMPLATE_COUNTS[name]


def test_every_shipped_template_takes_a_class_name() -> None:
    for name in TEMPLATE_COUNTS:
        prompts = load_templates(name).prompts("zebra")
        assert all("zebra" in text and "{" not in text for text in prompts), name


@pytest.mark.parametrize("name", sorted(CLASS_COUNTS))
def test_the_shipped_classes(name: str) -> None:
    classes = load_classes(name)
    assert len(classes) == CLASS_COUNTS[name]
    assert all(text == text.strip() != "" for text in classes)


def test_imagenet_names_are_openais() -> None:
    """Curated, not WordNet's: class 134 is the bird, 517 the machine, and both read so."""
    classes = load_classes("openai")
    assert classes[:2] == ("tench", "goldfish")
    assert (classes[134], classes[517]) == ("crane bird", "construction crane")
    assert load_templates("simple").texts[0] == "itap of a {c}."


def test_shipped_data_are_what_the_packages_hold() -> None:
    """Nothing was lost or reordered in copying (the packages are not needed at run time)."""
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    assert load_classes("imagenet1k") == tuple(metadata.IMAGENET_CLASSNAMES)
    for name, functions in (
        ("imagenet1k", metadata.OPENAI_IMAGENET_TEMPLATES),
        ("simple", metadata.SIMPLE_IMAGENET_TEMPLATES),
    ):
        expected = [function("sea urchin") for function in functions]
        assert list(load_templates(name).prompts("sea urchin")) == expected


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifar10", "cifar10"),
        ("CIFAR-10", "cifar10"),
        ("clip-benchmark/wds_cifar100", "cifar100"),
        ("hf:clip-benchmark/wds_vtab-pets", "pets"),
        ("hf:clip-benchmark/wds_vtab-flowers", "flowers"),
        ("oxford_iiit_pet", "pets"),
        ("stanford_cars", "cars"),
        ("imagenet-1k", "imagenet1k"),
        ("/somewhere/eurosat/", "eurosat"),
        ("voc2007_multilabel", "voc2007_multilabel"),
        ("/home/me/holidays", "simple"),
        ("", "simple"),
    ],
)
def test_a_data_set_brings_its_templates(dataset: str, expected: str) -> None:
    assert default_templates(dataset).name == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a photo of a {}.", "a photo of a red fox."),
        ("{c} from above", "red fox from above"),
        ("the {class}, yes the {}", "the red fox, yes the red fox"),
        ("a {x} {0} {} }{", "a {x} {0} red fox }{"),
    ],
)
def test_placeholders(template: str, expected: str) -> None:
    assert Templates("mine", (template,)).prompts("red fox") == (expected,)


def test_a_class_name_is_not_a_pattern() -> None:
    r"""With re.sub's replacement syntax "\1" would be an error and "\n" a line break."""
    assert Templates("mine", ("a {}",)).prompts(r"C:\1\new {c}") == (r"a C:\1\new {c}",)


def test_own_files(tmp_path: Path) -> None:
    lines = tmp_path / "mine.txt"
    lines.write_text("﻿a drawing of a {}.\n\n  {c} in ink  \n", encoding="utf-8")
    assert load_templates(lines).texts == ("a drawing of a {}.", "{c} in ink")
    listed = tmp_path / "mine.json"
    listed.write_text('["a drawing of a {}."]')
    assert load_templates(str(listed)).texts == ("a drawing of a {}.",)
    per_class = tmp_path / "cupl.json"
    per_class.write_text('{"cat": ["Whiskers.", "A cat purrs."], "dog": ["It barks."]}')
    prompts = load_templates(per_class)
    assert prompts.prompts("cat") == ("Whiskers.", "A cat purrs.")
    with pytest.raises(InputError, match=r"have none for class 'dgo'; did you mean 'dog'\?"):
        prompts.prompts("dgo")
    names = tmp_path / "classes"
    names.write_text("red fox\nowl\n")
    assert load_classes(names) == ("red fox", "owl")


def test_a_file_named_as_a_set_is_the_file(tmp_path: Path) -> None:
    own = tmp_path / "simple"
    own.write_text("my {}")
    assert load_templates(own).texts == ("my {}",)
    assert load_templates("simple").texts != ("my {}",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", "", "a.txt is empty; give at least one text"),
        ("a.json", "[]", "a.json is empty; give at least one text"),
        (
            "a.txt",
            "a {}\na photo",
            "template 2 of a.txt has no placeholder for the class name: 'a photo'",
        ),
        ("a.json", '["{}", 3]', "entry 2 is 3; expected a text"),
        ("a.json", '["{}", "  "]', "entry 2 is '  '; expected a text"),
        ("a.json", '"{}"', "expected a list of texts, got str"),
        ("a.json", '{"cat": []}', "class 'cat' is empty"),
        ("a.json", '{"cat": "a cat"}', "class 'cat': expected a list of texts, got str"),
        ("a.json", "{}", "a.json is empty"),
        ("a.json", "[", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_bad_files(file: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_templates(path)
    assert message in str(caught.value)


def test_what_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a {}\xff")
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 4\)"):
        load_templates(path)


def test_classes_as_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"cat": 0}))
    with pytest.raises(InputError, match="expected a list of texts, got dict"):
        load_classes(path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"neither a file nor a known set; did you mean 'cifar10'"):
        load_templates("cifar1O")
    with pytest.raises(InputError, match=r"known sets: caltech101, .*dtd"):
        load_classes("nothing like it")
