from setuptools import find_packages, setup

setup(
    name="elpo_ray",
    version="0.1.0",
    packages=find_packages(include=["elpo_ray*", "sandbox*"]),
    python_requires=">=3.11",
    entry_points={"vllm.general_plugins": ["elpo_ray = elpo_ray.vllm_plugin:register"]},
)
