"""A repository of the Hugging Face Hub, of models or of data sets, by the library huggingface_hub.

    hf://ORG/REPO[@BRANCH]    hf://datasets/ORG/REPO[@BRANCH]

Bytes are uploaded when they are put, and appear in the repository with the next action, in one commit: so an action
never names what is not there, and a result is one commit. HF_ENDPOINT and HF_TOKEN (or what `hf auth login` left) count
as they do for `fetch`; the token goes to the Hub's host alone, not to the one where it keeps bytes.
"""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.errors import UsageError
from sdforge.lines import hub_endpoint, hub_token, open_line, refuse_insecure
from sdforge.references import PART
from sdforge.remotes.http import PATIENCE, Asked, out_of_service, tried, write

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

ADDRESS = re.compile(rf"hf://(datasets/)?({PART}/{PART})(?:@({PART}))?/?")
NO_FILE = "EntryNotFound"  # in the header X-Error-Code: the repository is there, and has no such file


class HubRemote:
    """`cas/ab/SHA256` and `ac/ab/SHA256` in a repository."""

    def __init__(self, address: str) -> None:
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars

        found = ADDRESS.fullmatch(address)
        if not found or ".." in address:
            raise UsageError(
                f"{address!r} is no repository of the Hub", hint="as in hf://ORG/REPO or hf://datasets/ORG/REPO"
            )
        self.repository, self.branch = found[2], found[3] or "main"
        self.kind = "dataset" if found[1] else "model"
        self.endpoint = hub_endpoint()
        refuse_insecure(self.endpoint)  # the library would send the token there
        self.token = hub_token()
        self.api = huggingface_hub.HfApi(self.endpoint, token=self.token.value or False)
        disable_progress_bars()  # ours are the reporter's
        self.uploaded: dict[str, CommitOperationAdd] = {}  # path → what the next commit adds

    def has(self, space: str, name: str) -> bool:
        from huggingface_hub.errors import EntryNotFoundError

        if _path(space, name) in self.uploaded:
            return True
        try:
            self.api.get_hf_file_metadata(url=self._url(space, name), token=self.api.token)
        except EntryNotFoundError:
            return False
        except Exception as error:  # of the HTTP library underneath, which is not ours to name
            raise self._gone(error) from None
        return True

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        asked = Asked(self.token.host, self.token.name, bool(self.token.value))
        return bool(tried(lambda: self._once(self._url(space, name), into, limit), asked))

    def _once(self, address: str, into: Path, limit: int) -> bool:
        try:
            with open_line(address, self.token, {"Accept-Encoding": "identity"}, PATIENCE) as answer:
                return write(answer, into, limit)
        except urllib.error.HTTPError as error:
            if error.code == 404 and error.headers.get("X-Error-Code", NO_FILE) != NO_FILE:
                error.close()
                raise out_of_service(self.token.host, f"it shows no repository {self.repository}") from None
            raise

    def put(self, space: str, name: str, path: Path) -> None:
        from huggingface_hub import CommitOperationAdd

        place = _path(space, name)
        adding = CommitOperationAdd(place, path.read_bytes() if space == "ac" else path)
        where: Any = {"repo_id": self.repository, "repo_type": self.kind, "revision": self.branch}
        try:
            self.api.preupload_lfs_files(additions=[adding], **where)
            self.uploaded[place] = adding
            if space == "ac":
                self.api.create_commit(
                    operations=list(self.uploaded.values()), commit_message=f"Add {name[:12]}", **where
                )
                self.uploaded = {}
        except Exception as error:  # of the HTTP library underneath, which is not ours to name
            raise self._gone(error) from None

    def _url(self, space: str, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            self.repository, _path(space, name), repo_type=self.kind, revision=self.branch, endpoint=self.endpoint
        )

    def _gone(self, error: Exception) -> Exception:
        return out_of_service(self.token.host, (str(error).splitlines() or [type(error).__name__])[0][:200])


def _path(space: str, name: str) -> str:
    """Return where a name lies: in folders, since a folder of the Hub holds ten thousand files at most."""
    return f"{space}/{name[:2]}/{name}"
