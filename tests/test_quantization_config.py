"""`quantization_config` of a checkpoint: layers by their names, and what is refused there."""

import json

import pytest

import lutgemm
from lutgemm.errors import CheckpointError
from lutgemm.formats import BCQLayout, CodebookLayout
from lutgemm.integrations.quantization_config import build, layers_from_json, layers_to_json, parse

BCQ = lutgemm.BCQConfig(bits=4, group_size=32, scale_kind="free", method="greedy")


def test_layers_json_groups_equal_layouts():
    bcq, codebook = BCQLayout(8, 64, 3, 32), CodebookLayout(8, 64, 1, 4, 8, 32)
    layers = layers_to_json({"a": bcq, "b": codebook, "c": BCQLayout(16, 128, 3, 32)})
    assert [entry["modules"] for entry in layers] == [["a", "c"], ["b"]]
    assert layers_from_json(json.loads(json.dumps(layers))) == {
        "a": bcq.to_dict(),
        "b": codebook.to_dict(),
        "c": bcq.to_dict(),
    }
    parsed = parse(json.loads(json.dumps(build(BCQ, {"a": bcq}))))
    assert parsed.config == BCQ
    assert parse(build(None, {})).config is None


@pytest.mark.parametrize(
    "layers",
    [None, {}, [3], [{"modules": []}], [{"layout": {}, "modules": []}], [{"layout": {"format": "bcq"}, "modules": "a"}],
     [{"layout": {"format": "bcq"}, "modules": [1]}], [{"layout": {"format": "bcq"}, "modules": [""]}]],
)  # fmt: skip
def test_malformed_layers_are_refused(layers):
    with pytest.raises(CheckpointError, match="layers"):
        layers_from_json(layers)
