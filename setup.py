"""Ranges that are known to work; `constraints.txt` pins the exact set that CI and `make` use.

DALI comes as one package per CUDA release, all of which hold the same files, so only one may be installed:
`pip install -e .` takes the CUDA 13 build, `DALI_CUDA=120 pip install -e .` the CUDA 12 one, and
`DALI_CUDA=none pip install -e '.[cuda120]'` leaves the choice to the extra.  cuda110 ends at DALI 1.50 and needs
NVIDIA's own index (https://pypi.nvidia.com).
"""

import os

from setuptools import find_packages, setup

DALI = {
    "cuda130": "nvidia-dali-cuda130>=2.0,<3",
    "cuda120": "nvidia-dali-cuda120>=1.50,<3",
    "cuda110": "nvidia-dali-cuda110>=1.34,<1.51",
}
BENCH = ["opencv-python-headless>=4.10"]
# rasterio 1.5 has no wheel for Python 3.11, rio-cogeo 7 none for 3.10
SCENE = ["rasterio>=1.4,<1.6", "rio-cogeo>=5.4,<8"]
STAC = ["pystac>=1.10"]
DOWNLOAD = ["botocore>=1.36", "urllib3>=1.26"]
chosen = "cuda" + os.environ.get("DALI_CUDA", "130")

setup(
    name="biomass-engine",
    version="0.1.0",
    description="Training engine for satellite time series on NVIDIA DALI and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["engine*", "kernels*"]),
    package_data={"engine": ["py.typed"], "engine.data": ["datasets/*.yaml"], "kernels.month_attention": ["*.cpp"],
                  "kernels.packed_chip": ["*.cpp"]},
    install_requires=[
        "deepspeed>=0.19,<0.20",
        "torch>=2.11,<2.16",
        "torchvision",  # timm needs it
        "timm>=1.0.20,<2",
        "numpy>=2.0",
        "tifffile>=2024.1",
        "tensorboard>=2.17",
        "safetensors>=0.5",
        "lz4>=4.3",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "setuptools",  # tensorboard and DeepSpeed's op builder import it
        *([DALI[chosen]] if chosen != "cudanone" else []),
    ],
    extras_require={
        **{extra: [package] for extra, package in DALI.items()},
        "download": DOWNLOAD,  # launch/prepare.py download
        "scene": SCENE,  # rasters in, maps out: launch/predict.py --scene, launch/prepare.py cut
        "stac": [*SCENE, *STAC],  # scenes from a STAC item collection
        "xarray": ["xarray"],
        "bench": BENCH,  # the loader that benchmarks/loader.py compares with
        # moto with flask is a real S3 server for the tests; moto[server] would add 24 packages for other services.
        "dev": ["xarray", *BENCH, *DOWNLOAD, *SCENE, *STAC, "moto[s3]>=5", "flask", "flask-cors",
                "pytest>=8", "pytest-xdist>=3.6", "coverage>=7.10", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.14",
                "types-PyYAML"],
    },
)
