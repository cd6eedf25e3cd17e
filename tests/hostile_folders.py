"""What tests of hostile models share: copies of a dense checkpoint and of its quantized one, to be damaged."""

import shutil

from test_eval import char_tokenizer, tiny_llama

from lutgemm import BCQConfig
from lutgemm.checkpoint import quantize_checkpoint


def both_checkpoints(tmp_path_factory):
    """A dense checkpoint `src` and what `quantize` makes of it, `dst`."""
    folder = tmp_path_factory.mktemp("template")
    tiny_llama().save_pretrained(folder / "src")
    char_tokenizer().save_pretrained(folder / "src")
    config = BCQConfig(bits=4, group_size=32, method="rtn")
    quantize_checkpoint(folder / "src", folder / "dst", config, progress=False)
    return folder


def copied_source(template, tmp_path):
    return shutil.copytree(template / "src", tmp_path / "src")


def copied_result(template, tmp_path):
    return shutil.copytree(template / "dst", tmp_path / "dst")
