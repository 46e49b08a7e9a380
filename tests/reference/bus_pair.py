"""Both ends of the control plane joined by two queues, with a device side that does as it is told.

Nothing but the two state machines runs here: no hypervisor, no memory, no rings. Invariants of both ends are
checked after every step.
"""

import struct
from collections import Counter, deque
from dataclasses import dataclass, field
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus.guest import GuestMachine
from vmbus.bus.host import HostMachine
from vmbus.bus.offer import Offer
from vmbus.bus.transitions import ChannelState, LinkState
from vmbus.bus.wire import MessageType

PAGES = 4096
INTERRUPT_PAGE = 0x3000
MONITOR_PAGES = act.MonitorPages(0x4000, 0x5000)


def an_offer(number: int, subchannel: int = 0, **more: object) -> Offer:
    return Offer(UUID(int=0xA000 + number % 3), UUID(int=number), subchannel_index=subchannel, **more)  # type: ignore[arg-type]


def ranges_of(pages: int, first: int = 16) -> bytes:
    """`pages` whole pages from page number `first` on, as one packed GPA range."""
    return struct.pack(f"<II{pages}Q", pages * 4096, 0, *range(first, first + pages))


def type_of(payload: bytes) -> MessageType:
    return MessageType(int.from_bytes(payload[:4], "little"))


@dataclass
class Pair:
    """The two machines, what is under way between them, and what the device side was told.

    `accept_open` and `accept_gpadl` are the device side's answers; None holds the answer back.
    """

    host: HostMachine = field(default_factory=lambda: HostMachine(PAGES, 4))
    guest: GuestMachine = field(
        default_factory=lambda: GuestMachine(interrupt_page=INTERRUPT_PAGE, monitor_pages=MONITOR_PAGES)
    )
    accept_open: bool | None = True
    accept_gpadl: bool | None = True

    def __post_init__(self) -> None:
        self.to_host: deque[act.Post] = deque()
        self.to_guest: deque[act.Send] = deque()
        self.events: list[act.GuestEvent] = []
        self.actions: list[act.HostAction] = []
        self.seen: Counter[MessageType] = Counter()
        self.opened: dict[int, act.OpenDevice] = {}
        self.mapped: dict[int, act.MapGpadl] = {}
        self.held: list[act.OpenDevice | act.MapGpadl] = []
        self.connected = False

    # -- moving messages

    def post(self, events: list[act.GuestEvent]) -> list[act.GuestEvent]:
        for event in events:
            if isinstance(event, act.Post):
                self.to_host.append(event)
            else:
                self.events.append(event)
        self.check()
        return events

    def obey(self, actions: list[act.HostAction]) -> None:
        """The device side: at most once open, mapped exactly while the machine says so."""
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            self.actions.append(action)
            if isinstance(action, act.Send):
                self.to_guest.append(action)
            elif isinstance(action, act.Established):
                self.connected = True
            elif isinstance(action, act.Disconnected):
                self.connected = False
            elif isinstance(action, act.OpenDevice):
                assert action.offer_id not in self.opened, "opened twice"
                assert any(m.gpadl_id == action.request.gpadl_id for m in self.mapped.values()), "no ring"
                self.opened[action.offer_id] = action
                todo.extend(self._answer(action, self.accept_open))
            elif isinstance(action, act.CloseDevice):
                assert self.opened.pop(action.offer_id), "closed what is not open"
            elif isinstance(action, act.MapGpadl):
                assert action.serial not in self.mapped
                self.mapped[action.serial] = action
                todo.extend(self._answer(action, self.accept_gpadl))
            elif isinstance(action, act.UnmapGpadl):
                assert self.mapped.pop(action.serial), "unmapped what is not mapped"
        self.check()

    def _answer(self, action: act.OpenDevice | act.MapGpadl, answer: bool | None) -> list[act.HostAction]:
        if answer is None:
            self.held.append(action)
            return []
        return self._complete(action, answer)

    def _complete(self, action: act.OpenDevice | act.MapGpadl, ok: bool) -> list[act.HostAction]:
        if isinstance(action, act.OpenDevice):
            if not ok and self.opened.get(action.offer_id) is action:
                del self.opened[action.offer_id]
            return self.host.complete_open(action.serial, ok)
        if not ok:
            self.mapped.pop(action.serial, None)
        return self.host.complete_gpadl(action.serial, ok)

    def complete_held(self, index: int, ok: bool) -> None:
        """Answer an open or GPADL that was held back, perhaps too late."""
        self.obey(self._complete(self.held.pop(index), ok))

    def step_host(self) -> bool:
        """Deliver one message to the host."""
        if not self.to_host:
            return False
        post = self.to_host.popleft()
        self.seen[type_of(post.payload)] += 1
        self.obey(self.host.receive(post.payload, post.connection_id))
        return True

    def step_guest(self) -> bool:
        """Deliver one message to the guest."""
        if not self.to_guest:
            return False
        send = self.to_guest.popleft()
        self.seen[type_of(send.payload)] += 1
        self.post(self.guest.receive(send.payload))
        return True

    def run(self) -> list[act.GuestEvent]:
        """Deliver everything; the guest's events since the last call."""
        while self.step_host() or self.step_guest():
            pass
        events, self.events = self.events, []
        return events

    # -- whole sequences

    def connect(self, *versions: int) -> list[act.GuestEvent]:
        """Connect and ask for offers."""
        self.post(self.guest.connect(versions or None))
        events = self.run()
        if self.guest.version:
            self.post(self.guest.request_offers())
            events += self.run()
        return events

    def offer(self, offer: Offer) -> int:
        offer_id, actions = self.host.offer(offer)
        self.obey(actions)
        return offer_id

    def rescind(self, offer_id: int) -> None:
        self.obey(self.host.rescind(offer_id))

    def gpadl(self, channel_id: int, pages: int = 8) -> int:
        gpadl_id, posts = self.guest.create_gpadl(channel_id, ranges_of(pages))
        self.post(posts)
        return gpadl_id

    def open(self, channel_id: int, pages: int = 8) -> int:
        """Make a ring GPADL and open over it; the GPADL's id."""
        gpadl_id = self.gpadl(channel_id, pages)
        self.run()
        self.post(self.guest.open(channel_id, gpadl_id, pages // 2))
        self.run()
        return gpadl_id

    # -- invariants

    def check(self) -> None:
        self.host.check()
        self.guest.check()
        channels = self.host.channels
        for offer_id in self.opened:
            assert channels[offer_id].device_open
        for channel in channels.values():
            assert channel.device_open <= (channel.offer_id in self.opened)
        used = {g.serial for g in self.host.gpadls.values() if g.is_used}
        used |= {c.reserved_gpadl.serial for c in channels.values() if c.reserved_gpadl}
        assert set(self.mapped) == used
        assert self.connected == (self.host.version != 0)

    def check_agreement(self) -> None:
        """With nothing under way and nothing held back, both ends say the same."""
        assert not self.to_host
        assert not self.to_guest
        if self.held or self.guest.paused or self.guest.state in (LinkState.CONTACTING, LinkState.UNLOADING):
            return
        assert self.guest.version == self.host.version
        assert self.guest.features == self.host.features
        assert self.guest.state is self.host.state
        ours = {c.channel_id: (c.state, c.offer.key) for c in self.host.channels.values() if c.channel_id}
        theirs = {n: (c.state, c.offer.key) for n, c in self.guest.channels.items()}
        assert ours == theirs
        reserved = {g for c in self.host.channels.values() if c.is_reserved and (g := c.reserved_gpadl)}
        ours_gpadls = {g.gpadl_id: g.state for g in self.host.gpadls.values()}
        ours_gpadls |= {g.gpadl_id: g.state for g in reserved}
        theirs_gpadls = {n: s for c in self.guest.channels.values() for n, s in c.gpadls.items()}
        assert ours_gpadls == theirs_gpadls
        for channel in self.host.channels.values():
            assert (channel.state is ChannelState.OPEN) == channel.device_open or channel.is_reserved
