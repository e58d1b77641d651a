"""Train a person re-identification model from synthetic people and unlabelled images of real people.

    import domainmix

    model = domainmix.load("data/runs/mine")              # a run's name or folder, a stage's folder, or a file
    features = domainmix.embed(model, "MY_CROPS")         # a folder, paths, Pillow images or arrays -> (N, D)
    clusters = domainmix.cluster(features)                # k-reciprocal Jaccard distance, DBSCAN
    labels = domainmix.refine(clusters.labels, 5, 120)    # Eq. (1): clusters of 5 to 120 images; -1 for the rest

`search(model, query, gallery)` finds the people of some images in a gallery, and `find_threshold(model, images)`
measures from which similarity two images show one person. `rank(query, gallery, query_pid, gallery_pid,
query_camera, gallery_camera)` computes mAP and CMC from features, and `run(config)` trains a model. These names are
imported at their first use, so `import domainmix` is fast and does not import torch. Everything else is in the
modules, such as `domainmix.losses`.
"""
__version__ = "0.1.0"

_MODULES = {  # the names that are offered and the modules that define them
    "load": "inference",
    "embed": "inference",
    "cluster": "pseudolabel",
    "refine": "pseudolabel",
    "rank": "evaluation",
    "run": "runs.pipeline",
    "search": "gallery",
    "find_threshold": "verification",
}
__all__ = list(_MODULES)


def __getattr__(name):
    "Import one of these names at its first use."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    "All names, these included before their first use."
    return sorted({*globals(), *_MODULES})
