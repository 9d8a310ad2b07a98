"""Commands on pairs of images and captions: `python -m farl.data build` and `python -m farl.data check`."""
