import sys
import types

import pytest
from click.testing import CliRunner

from pelton.cli.main import pelton as command_line
from tests.helpers.fake_parts import FakeBuilt


@pytest.fixture
def built(monkeypatch):
    """Replaces ``pelton.build.build``: every LLM of the test runs on ``built.parts``; configs are kept."""
    state = types.SimpleNamespace(parts=FakeBuilt(), configs=[])

    def build(config, progress=None):
        state.configs.append(config)
        return state.parts

    module = types.ModuleType("pelton.build")
    module.build = build
    monkeypatch.setitem(sys.modules, "pelton.build", module)
    return state


@pytest.fixture
def pelton():
    """Runs the command line: pelton("run", "-p", "hi", input=...)."""

    def invoke(*arguments, input=None):
        return CliRunner().invoke(command_line, [str(a) for a in arguments], input=input)

    return invoke
