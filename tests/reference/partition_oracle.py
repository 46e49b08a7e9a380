"""Who reaches which page in a tree of partitions, who is connected to whom: kept the slow and obvious way.

A page of a partition is an entry; a child's entry names the parent's entry that it was made from. It holds exactly
while the parent still has that very entry there, and that entry holds. Nothing is ever taken back
actively: whoever looks walks up to the root.
"""


class Entry:
    """What lies at one address of a partition."""

    def __init__(self, rights, backing, lender=None, lender_gpa=0):
        self.rights, self.backing, self.lender, self.lender_gpa = rights, backing, lender, lender_gpa
        self.deposited = False


class Node:
    """A partition as the oracle knows it."""

    def __init__(self, identifier, parent, privileges, *, active):
        self.id, self.parent, self.privileges, self.active = identifier, parent, privileges, active
        self.finalized = False
        self.children = {}
        self.pages = {}
        self.pool = []  # (giver, address, entry)
        self.ports = {}
        self.connections = {}
        if parent is not None:
            parent.children[identifier] = self

    def holds(self, gpa):
        """The entry at `gpa` if it is (still) the partition's to have, else None."""
        entry = self.pages.get(gpa)
        if entry is None:
            return None
        if entry.lender is not None:
            above = self.parent.holds(entry.lender_gpa)
            if above is not entry.lender or above.deposited:
                return None
        return entry

    def access(self, gpa):
        entry = self.holds(gpa)
        return 0 if entry is None or entry.deposited else entry.rights

    def everybody(self):
        yield self
        for child in list(self.children.values()):
            yield from child.everybody()

    # What calls that succeeded have done

    def lend(self, child, gpa, source, rights):
        entry = self.holds(source)
        assert entry is not None, "passed on a page that it does not have"
        assert not entry.deposited, "passed on a deposited page"
        assert not rights & ~entry.rights, "passed on more than it may do itself"
        child.pages[gpa] = Entry(rights, entry.backing, entry, source)

    def deposit(self, target, gpa):
        old = self.holds(gpa)
        assert old is not None, "deposited a page that it does not have"
        assert not old.deposited, "deposited twice"
        assert old.rights & 3 == 3, "deposited what it may not write"
        # A new entry: children that had the page from the old one have it no longer, also once it is back.
        entry = self.pages[gpa] = Entry(old.rights, old.backing, old.lender, old.lender_gpa)
        entry.deposited = True
        target.pool.append((self, gpa, entry))

    @staticmethod
    def give_back(deposit):
        _, _, entry = deposit
        entry.deposited = False

    def withdraw(self, target, gpa):
        for at in range(len(target.pool) - 1, -1, -1):
            if target.pool[at][:2] == (self, gpa):
                self.give_back(target.pool.pop(at))
                return
        raise AssertionError(f"withdrew page {gpa:#x} that it had not deposited there")

    def finalize(self):
        for child in list(self.children.values()):
            child.delete()
        self.finalized = True
        self.ports.clear()
        self.connections.clear()
        if self.parent is not None:
            for owner in (self.parent, *self.parent.children.values()):
                owner.ports = {k: p for k, p in owner.ports.items() if p["for"] is not self}

    def delete(self):
        self.finalize()
        for deposit in self.pool:
            self.give_back(deposit)
        self.pool.clear()
        if self.parent is not None:
            del self.parent.children[self.id]
