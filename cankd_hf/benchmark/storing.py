"""Recipes whose teachers are stored, for a measurement."""

from dataclasses import replace
from pathlib import Path

from cankd_hf.config.recipe import Recipe
from cankd_hf.config.teacher import CacheConfig, TeacherConfig


def with_caches(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the answers of all its teachers stored in a folder, one view of each image, by the codecs that
    it names, else the default one."""

    def cached(config: TeacherConfig) -> TeacherConfig:
        cache = CacheConfig(views=1) if config.cache is None else config.cache
        views = None if cache.whole else 1
        return replace(config, cache=replace(cache, views=views, folder=str(folder), seed=None, repo=None))

    return recipe.with_teachers({name: cached(config) for name, config in recipe.named_teachers().items()})
