"""The folder of compiled programs: the user's own, or none."""

import subprocess
import sys

import pytest

from jdetune.cli.compile_cache import use_compile_cache


def test_programs_are_kept_in_a_folder_of_the_users_own(tmp_path):
    environ = {"JDETUNE_CACHE": str(tmp_path)}
    use_compile_cache(environ)
    folder = environ["JAX_COMPILATION_CACHE_DIR"]
    assert folder.startswith(str(tmp_path / "compiled"))
    assert environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"


@pytest.mark.parametrize("value", ["", "/somewhere"])
def test_a_setting_of_the_users_stays(tmp_path, value):
    environ = {"JDETUNE_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": value}
    use_compile_cache(environ)
    assert environ["JAX_COMPILATION_CACHE_DIR"] == value
    assert not (tmp_path / "compiled").exists()


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    environ = {"JDETUNE_CACHE": str(tmp_path)}
    use_compile_cache(environ)
    (folder,) = (tmp_path / "compiled").iterdir()
    folder.chmod(0o777)
    again = {"JDETUNE_CACHE": str(tmp_path)}
    use_compile_cache(again)
    assert "JAX_COMPILATION_CACHE_DIR" not in again


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    code = (
        "import os\n"
        "from jdetune.cli.main import prepare_environment\n"
        "prepare_environment()\n"
        "import jax, jax.numpy as jnp, jax.monitoring\n"
        "seen = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))\n"
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))\n"
        "print(sum('cache_hits' in name for name in seen))\n"
    )
    environ = {"JDETUNE_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    hits = [
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                env=environ,
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            ).stdout
        )
        for _ in range(2)
    ]
    assert hits[0] == 0
    assert hits[1] > 0
