"""On request: a model whose layers are on two nodes in this process."""

import pytest
from row_of_nodes import Nodes


@pytest.fixture
def in_segments():
    found = Nodes(kv_type="Q4_0")
    yield found
    found.close()


@pytest.fixture
def nodes():
    found = Nodes()
    yield found
    found.close()
