"""From BTCV's download to the table per organ, by the configuration that docs/many_organs.md names."""

import re
from pathlib import Path

import pytest
import yaml

from tests import collections
from tests.integration.test_workflow import WORKFLOW, command, environment, tmp_path  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:  # noqa: F811
    """The configuration with generated images, one step of a small network on a CPU, and three of its methods."""
    collections.btcv(tmp_path / "download", numbers=[f"{n:04d}" for n in (*range(1, 11), *range(21, 41))], scale=2)
    config = yaml.safe_load((WORKFLOW / "config" / "btcv.yaml").read_text())
    data = config["datasets"]["BTCV"]
    data["convert"][1] = str(tmp_path / "download" / "Abdomen" / "RawData")
    small = {"device": "cpu", "loaders": 0, "threads": 1, "options": "epochs1_iters1_valiters1", "seeds": [0]}
    config |= small | {"output": "out", "reduce": {"patch": [16, 16, 16], "features": 4, "stages": 3}}
    wanted = ("labelled only", "MagicNet, GA", "DyCON, MagicNet, GA")
    config["methods"] = {name: config["methods"][name] for name in wanted}
    path = tmp_path / "btcv.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_configuration_of_btcv_leads_from_the_download_to_the_table(tmp_path, command, config):  # noqa: F811
    done = command("--cores", "2", config=config)
    assert done.returncode == 0, done.stdout[-5000:]
    (report,) = (tmp_path / "out" / "reports").rglob("report.md")
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", report.read_text(), re.M)]
    labeled = {cells(line)[0]: (cells(line)[1], cells(line)[2]) for line in tables[0][2:]}
    assert labeled["LabeledOnly"] == ("4", "0")  # validation cases are not trained on
    assert labeled["LabeledOnly_upper-bound"] == ("20", "0")
    assert labeled["DyCONGAMagicNet"] == labeled["GAMagicNet"] == ("4", "16")
    (organs,) = (table for table in tables if cells(table[0])[-2:] == ["RAG", "LAG"])
    assert len(cells(organs[0])) == 3 + 13
    assert {cells(line)[0] for line in organs[2:]} == set(labeled)


def cells(line: str) -> list[str]:
    """Return the cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
