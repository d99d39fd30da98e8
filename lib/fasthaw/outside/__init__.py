"""What torch, fastai, torchvision and Python keep to themselves and we lean on: each once, with the reason why.

None of it is promised, so a new version may take it away without a word. `tests/test_outside.py` has a test for each and
then fails by name. One file a package, as the lower layers have torch alone; nobody else may touch what begins with an
underscore (ruff's SLF001). `_modules`, `_parameters`, `_buffers` and the hooks of a module count as public: they are in
every checkpoint tool, and torch's own documentation names them.
"""
