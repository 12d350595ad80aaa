"""Build the package from settings.ini, the one place where its facts stand."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(HERE / "settings.ini", encoding="utf-8")
package = settings["DEFAULT"]


def words(key: str) -> list[str]:
    """The requirements listed under `key`, one string each."""
    return package[key].split()


# The notebooks travel inside the wheel as the data of a package that is mapped onto nbs/.
notebook_folders = [
    folder
    for folder in [HERE / "nbs", *sorted(p for p in (HERE / "nbs").rglob("*") if p.is_dir())]
    if not any(part.startswith((".", "_")) for part in folder.relative_to(HERE).parts)
]
notebook_packages = [
    ".".join(["shuffle_nb", *folder.relative_to(HERE).parts]) for folder in notebook_folders
]

setup(
    name=package["lib_name"],
    version=package["version"],
    description=package["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=package["author"],
    author_email=package["author_email"],
    url=package["git_url"],
    project_urls={
        "Documentation": package["doc_host"] + package["doc_baseurl"],
        "Changelog": f"{package['git_url']}/blob/{package['branch']}/CHANGELOG.md",
    },
    license="Apache-2.0",
    keywords=package["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={package['min_python']}",
    packages=[*find_packages(include=["shuffle_nb", "shuffle_nb.*"]), *notebook_packages],
    package_dir={"shuffle_nb": "shuffle_nb", "shuffle_nb.nbs": "nbs"},
    package_data={
        "": [
            "*.safetensors",
            "*.reference.json",
            "*.reference.csv",
            "reference_agreement.json",
            "py.typed",
        ],
        **{name: ["*.ipynb"] for name in notebook_packages},
    },
    install_requires=words("requirements"),
    extras_require={
        "notebooks": words("notebooks_requirements"),
        "data": words("data_requirements"),
        "dev": words("notebooks_requirements") + words("dev_requirements"),
    },
    entry_points={
        "console_scripts": ["shuffle-nb = shuffle_nb.__main__:main"],
        # The docs find each function's source and page through this index.
        "nbdev": ["shuffle_nb=shuffle_nb._modidx:d"],
    },
    zip_safe=False,
)
