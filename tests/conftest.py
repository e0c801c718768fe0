import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Miniatures are too small to gain from threads, and tests run side by side."""
    torch.set_num_threads(1)
