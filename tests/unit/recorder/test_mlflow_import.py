"""The import of MLflow, in a process of its own, with packages in its place that do what MLflow's versions do."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
HOME = Path(__file__).parents[3]
WITHOUT = "try:\n    import pandas\nexcept ImportError:\n    pass"
CODE = """
import sys
from trackopt.recorder.sinks.mlflow_import import import_mlflow
import_mlflow()
print("pandas" in sys.modules)
import mlflow, pandas
print(mlflow.whole, pandas.whole)
"""


@pytest.mark.parametrize(("mlflow", "loaded"), [(WITHOUT, False), ("import pandas", False)])
def test_packages_for_data_frames_are_left_out_where_they_can_be(mlflow, loaded, tmp_path):
    """A version that needs one of them is imported as usual afterwards."""
    for name, content in (("mlflow", f"import mlflow.part\n{mlflow}"), ("pandas", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"{content}\nwhole = True")
    (tmp_path / "mlflow" / "part.py").write_text("")
    environment = {"PYTHONPATH": f"{tmp_path}:{HOME}"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout == f"{loaded}\nTrue True\n", done.stderr
