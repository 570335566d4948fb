"""The Hugging Face hub as a folder."""

from __future__ import annotations

import pathlib
import shutil

import huggingface_hub


class FakeHub:
    """The hub's repositories as directories: what `HfApi` and `snapshot_download` are asked here."""

    def __init__(self, root: pathlib.Path):
        self.root, self.commits, self.private = root, [], {}

    def create_repo(self, name, *, private, exist_ok, repo_type):
        assert exist_ok and repo_type == "model"
        self.private.setdefault(name, private)
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def list_repo_files(self, name):
        folder = self.root / name
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def create_commit(self, name, operations, *, commit_message):
        self.commits.append(commit_message)
        for operation in operations:
            path = self.root / name / operation.path_in_repo
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as file:
                    path.write_bytes(file.read())

    def snapshot_download(self, name, *, revision, allow_patterns, local_dir=None):
        if not (self.root / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no repository {name}")
        assert revision is None
        kept = huggingface_hub.utils.filter_repo_objects(self.list_repo_files(name), allow_patterns=allow_patterns)
        target = pathlib.Path(local_dir or self.root / "cache" / name)
        for file in kept:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / name / file, target / file)
        return str(target)
