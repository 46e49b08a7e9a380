"""The SynIC as an obvious model: a list of messages per SINT, a set of flags, a set of pending vectors."""

QUEUE = 1024


class SynicModel:
    """What a guest must observe, for unmasked SINTs with distinct vectors."""

    def __init__(self):
        self.slot = {}
        self.queue = {}
        self.flags = {}
        self.masked = set(range(16))
        self.owed = set()
        self.requested = set()
        self.in_service = []
        self.vectors = {}

    def _arrived(self, sint):
        if sint in self.masked:
            self.owed.add(sint)
        else:
            self.requested.add(self.vectors[sint])

    def post(self, sint, message):
        if sint in self.slot or self.queue.get(sint):
            if len(self.queue.setdefault(sint, [])) >= QUEUE:
                return False
            self.queue[sint].append(message)
        else:
            self.slot[sint] = message
            self._arrived(sint)
        return True

    def signal(self, sint, flag):
        flags = self.flags.setdefault(sint, set())
        if flag in flags:
            return False
        flags.add(flag)
        self._arrived(sint)
        return True

    def set_sint(self, sint, vector, masked):
        self.vectors[sint] = vector
        if masked:
            self.masked.add(sint)
        else:
            self.masked.discard(sint)
            if sint in self.owed:
                self.owed.discard(sint)
                self.requested.add(vector)
        self._flush(sint)

    def _flush(self, sint):
        if sint not in self.slot and self.queue.get(sint):
            self.slot[sint] = self.queue[sint].pop(0)
            self._arrived(sint)

    def end_of_message(self):
        for sint in sorted(self.queue):
            self._flush(sint)

    def deliverable(self):
        floor = max((v >> 4 for v in self.in_service), default=0)
        best = max(self.requested, default=0)
        return best if best >> 4 > floor else None

    def accept(self):
        vector = self.deliverable()
        if vector is not None:
            self.requested.discard(vector)
            self.in_service.append(vector)
        return vector

    def eoi(self):
        if not self.in_service:
            return
        vector = max(self.in_service)
        self.in_service.remove(vector)
        for sint in sorted(self.queue):
            if self.vectors.get(sint) == vector:
                self._flush(sint)
