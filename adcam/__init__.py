"AD-CAM for weakly-supervised semantic segmentation: a notebook per idea, a command per figure."
__version__ = "0.1.0"

_TOP = {"explain": "photo", "inspect": "photo"}  # names that are imported when they are first used: torch takes seconds


def __getattr__(name):
    if name not in _TOP:
        raise AttributeError(f"module 'adcam' has no attribute {name!r}; there are {', '.join(_TOP)} and the modules")
    from importlib import import_module
    value = getattr(import_module(f"adcam.{_TOP[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_TOP])
