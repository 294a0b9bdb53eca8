from tests.laws.conftest import backend, pytest_generate_tests  # noqa: F401 - the backends, as the laws reach them
