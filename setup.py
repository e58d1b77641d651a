"""Make the package from settings.ini, the one place for its version, its author and what it needs."""
import configparser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
ini.read(HERE / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def words(key):
    return cfg.get(key, "").split()


STATUS = {"1": "Planning", "2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}
readme = HERE / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        f"Development Status :: {cfg['status']} - {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["*.safetensors"]},  # learned from drawn people: nbs/17_body_parts.ipynb, nbs/23_builtin.ipynb
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={
        # numba makes loops of stage 1 and evaluation fast; without it they run in a slower way.
        "fast": words("fast_requirements"),
        # Any convolutional network of timm as a backbone.
        "timm": words("timm_requirements"),
        # To read HEIC, and colour TIFFs of sixteen bits.
        "images": words("images_requirements"),
        # To export a network, and to run what was exported.
        "onnx": words("onnx_requirements"),
        # To cut crops out of videos (frames as images need nothing more).
        "video": words("video_requirements"),
        # To look at the curves of runs in TensorBoard.
        "tensorboard": words("tensorboard_requirements"),
        # One run on several GPUs or machines.
        "scale": words("scale_requirements"),
        # To test the companion notebooks in a real browser.
        "browser": words("browser_requirements"),
        # Another way to find nearest neighbours. Take one of the two: they own the same folder.
        "cpu": words("cpu_requirements"),
        "gpu": words("gpu_requirements"),
        "notebooks": words("notebooks_requirements"),
        # To build the website.
        "docs": words("docs_requirements"),
        "dev": words("dev_requirements") + words("docs_requirements") + words("notebooks_requirements") + words("fast_requirements") + words("onnx_requirements")
        + words("video_requirements") + words("tensorboard_requirements") + words("scale_requirements"),
    },
    entry_points={"console_scripts": words("console_scripts")},
    zip_safe=False,
)
