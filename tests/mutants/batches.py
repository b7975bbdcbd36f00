"""Broken builds of batches and files that their tests must catch."""

from gateway.overflow import batches, shelf
from gateway.overflow.batch_input import BatchInput


def goes_on_from_the_first_line() -> None:
    """Who takes a batch up after a crash hands in the file from its beginning."""
    requests = BatchInput.requests
    BatchInput.requests = lambda rules, frames, skip: requests(rules, frames, 0)


def names_its_files_anew() -> None:
    """Who writes a batch's files again makes other ones."""
    batches._file_id = lambda batch_id, kind, settled_time: shelf.new_file_id(settled_time)


def hands_in_while_it_checks() -> None:
    """Lines are handed in before all of the file has been looked at."""
    BatchInput.check = lambda rules, frames: None


def shows_a_file_before_it_is_whole() -> None:
    """The record is there first, the content a moment later."""
    publish = shelf.Draft.publish

    def early(draft, filename, purpose, created_time, keep_s):
        record = shelf.FileRecord(
            draft.id, draft.size_bytes, int(created_time), int(created_time + keep_s), filename, purpose
        )
        path = draft._folder / f"{draft.id}.json"
        path.write_bytes(shelf.msgspec.json.encode(record))
        return publish(draft, filename, purpose, created_time, keep_s)

    shelf.Draft.publish = early


def forgets_whose_file_it_is() -> None:
    """All files are in one folder."""
    shelf.Shelf._folder = lambda self, tenant: self._directory / "all"


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        goes_on_from_the_first_line,
        names_its_files_anew,
        hands_in_while_it_checks,
        shows_a_file_before_it_is_whole,
        forgets_whose_file_it_is,
    )
}
