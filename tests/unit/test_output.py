"""Where commands write what they leave for other programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lmkit.commands.export import _target
from lmkit.commands.output import output_path, write_json
from lmkit.errors import ConfigError


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_link_that_leads_to_itself_is_replaced_by_a_file_and_is_no_folder(tmp_path: Path) -> None:
    ring = tmp_path / "ring"
    ring.symlink_to("ring")
    with pytest.raises(ConfigError, match="is not a folder; name a new folder"):
        _target(str(ring))
    write_json(output_path(str(ring)), {"ppl": 1.5})
    assert json.loads(ring.read_text(encoding="utf-8")) == {"ppl": 1.5}
    assert not ring.is_symlink()
