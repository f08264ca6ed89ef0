"""Where the repository keeps its data and runs."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]

ROOT = _checkout if (_checkout / "pyproject.toml").exists() else Path.cwd()
"""The repository's root; the current folder where the package was installed without a checkout."""
