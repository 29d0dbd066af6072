"""The packages of the wheel: recipes and comparisons lie beside the package in the repository, inside of it there."""

import runpy

from setuptools import find_packages, setup

SHIPPED = {"cankd_hf.shipped.recipes": "recipes", "cankd_hf.shipped.comparisons": "comparisons"}
BESIDE = ["py.typed", "**/*.css", "**/*.html", "**/*.md"]  # what lies beside the code: pages and templates

_ADDRESS = runpy.run_path("cankd_hf/names.py")["REPOSITORY"]
URLS = {
    "Homepage": _ADDRESS,
    "Documentation": f"{_ADDRESS}/tree/main/docs",
    "Repository": _ADDRESS,
    "Issues": f"{_ADDRESS}/issues",
    "Changelog": f"{_ADDRESS}/blob/main/CHANGELOG.md",
}

setup(
    project_urls=URLS,
    packages=[*find_packages(include=["cankd_hf*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={name: ["*.yaml"] for name in SHIPPED} | {"cankd_hf": BESIDE},
)
