"""What we lean on without a promise is still there: a new version of a package fails here, by name."""

import torchvision.models

from fasthaw.outside import torchvision as of_torchvision


def test_torchvision_registers_its_models_in_a_way_that_can_be_read():
    assert [*of_torchvision.model_names()] == torchvision.models.list_models()
