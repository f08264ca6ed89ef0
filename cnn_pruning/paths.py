"""Where the repository keeps its data and its runs."""

from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent

ROOT = _checkout if (_checkout / "pyproject.toml").exists() else Path.cwd()
"""The repository's root; the current folder where the package was installed without a checkout."""
