"""What an error of huggingface_hub means for the user, and what to do about it."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_ERRORS = (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, DryRunError)
"""What a request to the hub may end with; `HTTPError` covers connections that fail too."""

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def explained(error: Exception, repo: str, revision: str | None, in_cache: str) -> OSError:
    """Return the error to raise instead of one of `HUB_ERRORS`.

    Args:
        error: what came.
        repo: hub id of the model.
        revision: what was asked for; None for the main branch.
        in_cache: what the cache holds of the model, as a clause.
    """
    answer = error.__cause__
    if isinstance(answer, HfHubHTTPError) and not isinstance(error, HfHubHTTPError):
        error = answer
    failed = f"{repo!r} could not be loaded: "
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{failed}its authors ask for consent first. Accept the licence on {page}, then "
            f"{LOGIN} with the same account."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{failed}it has no revision {revision!r}. Give a branch, tag or commit listed on "
            f"{page}/commits/main, or leave the revision out."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{failed}the hub has no such model, or it is private. Check the id; if it is "
            f"private, {LOGIN}. A folder or 'demo' is loaded without the hub."
        )
    if isinstance(error, HfHubHTTPError):
        return _refused(error, failed)
    return FileNotFoundError(f"{failed}{_unreachable(error)}, and {in_cache}. {_WAY_OUT}")


_WAY_OUT = (
    "Connect and try again, which goes on with the files that are not there yet; or give a folder, "
    "a hub id that is cached, or 'demo'."
)


def _refused(error: HfHubHTTPError, failed: str) -> OSError:
    status = error.response.status_code
    if status in (401, 403):
        return PermissionError(
            f"{failed}the hub answered {status}, so the login is not accepted or may not read "
            f"this model. Check that the token is valid and may read it: {LOGIN}."
        )
    return ConnectionError(
        f"{failed}{constants.ENDPOINT} answered with an error ({status}). Try again later, which "
        "goes on with the files that are not there yet."
    )


def _unreachable(error: Exception) -> str:
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE=1 forbids to ask the hub"
    reason = error.__cause__ or error
    return f"{constants.ENDPOINT} cannot be reached ({type(reason).__name__}: {reason})"
