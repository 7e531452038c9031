"""``python -m lmkit.lm_eval``: the command ``lm_eval`` with the model ``lmkit`` added, everything else unchanged.

The harness (0.4.13) looks for models in its own table only, neither in entry points nor in --include_path, so that
someone has to add this one before its command line starts.
"""

from __future__ import annotations

import sys

from lmkit.errors import LmkitError, ResourceError


def main() -> int:
    """Run the harness's command line on ``sys.argv``; errors of lmkit are one line and lmkit's exit code."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate
            from lm_eval.api.registry import model_registry
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            missing = "lm-evaluation-harness" if package == "lm_eval" else f"{package}, of lm-evaluation-harness"
            raise ResourceError(f"python -m lmkit.lm_eval needs {missing}", "pip install 'lmkit[lm-eval]'") from None
        model_registry.register("lmkit", target="lmkit.lm_eval.model:RunModel")
        cli_evaluate()
    except LmkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
