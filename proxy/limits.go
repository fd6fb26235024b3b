package proxy

import (
	"errors"
	"math"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// maxRateKeys bounds how many keys a rateLimits remembers. A node has some hundred pods.
const maxRateKeys = 4096

// rateLimits is a token bucket per key. Keys that have been idle until their bucket was full again are forgotten; when
// there are too many keys at once, new ones share a bucket.
type rateLimits[K comparable] struct {
	rate, burst float64

	mu       sync.Mutex
	buckets  map[K]*bucket
	overflow bucket
	swept    time.Time
}

type bucket struct {
	tokens     float64
	last       time.Time
	suppressed int // since allow last said yes
}

func newRateLimits[K comparable](rate, burst float64) *rateLimits[K] {
	return &rateLimits[K]{rate: rate, burst: burst, buckets: map[K]*bucket{}, overflow: bucket{tokens: burst}}
}

// allow takes a token of key. When it says yes it tells how often it said no since the last time.
func (l *rateLimits[K]) allow(key K, now time.Time) (ok bool, suppressed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.buckets[key]
	if b == nil {
		l.sweep(now)
		if len(l.buckets) < maxRateKeys {
			b = &bucket{tokens: l.burst, last: now}
			l.buckets[key] = b
		} else {
			b = &l.overflow
		}
	}
	if idle := now.Sub(b.last); idle > 0 { // requests come here in any order
		b.tokens = min(l.burst, b.tokens+idle.Seconds()*l.rate)
		b.last = now
	}
	if b.tokens < 1 {
		b.suppressed++
		return false, 0
	}
	b.tokens--
	suppressed, b.suppressed = b.suppressed, 0
	return true, suppressed
}

// sweep forgets the buckets that are full again. It goes over all of them at most once per refill time.
func (l *rateLimits[K]) sweep(now time.Time) {
	refill := time.Duration(l.burst / l.rate * float64(time.Second))
	if now.Sub(l.swept) < refill {
		return
	}
	l.swept = now
	for key, b := range l.buckets {
		if now.Sub(b.last) >= refill {
			delete(l.buckets, key)
		}
	}
}

// shares divides the connections among the source IPs: see "What one pod may take" in the package documentation.
type shares struct {
	max, maxPerIP int

	last atomic.Pointer[source] // that was charged
	turn atomic.Int64           // when another one was charged than before: Unix nanoseconds

	mu      sync.Mutex
	total   int
	sources map[netip.Addr]*source
	swept   time.Time
}

func newShares(limit, limitPerIP int) *shares {
	return &shares{max: limit, maxPerIP: limitPerIP, sources: map[netip.Addr]*source{}}
}

// source is what one source IP has open, and how much of the daemon's time it has used.
type source struct {
	ip    netip.Addr
	conns map[*conn]struct{}
	used  atomic.Int64 // Unix nanoseconds: the moment at which everything charged so far is paid for
	moves atomic.Int64 // how often it has become another pod's
}

// What a source is charged, in time of its own; it has one second a second. These are several times what the daemon's
// processor needs, so that one source alone cannot keep it busy, and far from what an application asks for.
const (
	costAnswer  = 75 * time.Microsecond  // 13,333 a second: a load test of one pod
	costToken   = 100 * time.Microsecond // the PUT
	costConn    = 100 * time.Microsecond
	costRefusal = 500 * time.Microsecond
	credit      = 10 * time.Millisecond  // what may be used at once: the others wait for as long
	maxWait     = 300 * time.Millisecond // more than all connections of a source are worth, below a client's patience
)

// charge adds a cost and returns how long the source has to wait for being able to pay it, at most maxWait: then it has more
// to pay than it has connections to wait with, and a new one is refused.
func (s *source) charge(now time.Time, cost time.Duration) (wait time.Duration) {
	for t := now.UnixNano(); ; {
		used := s.used.Load()
		owed := max(used, t)
		if used-t > int64(time.Second) { // more than anybody can owe: the clock was set back
			owed = t
		}
		next := min(owed+int64(cost), t+int64(credit+maxWait))
		if s.used.CompareAndSwap(used, next) {
			return time.Duration(next-t) - credit
		}
	}
}

// owes says whether the source has more to pay than it may wait for.
func (s *source) owes(now time.Time) bool {
	return s.used.Load()+int64(costConn) >= now.UnixNano()+int64(credit+maxWait)
}

// alone is how long nobody else must have asked for a source to be alone.
const alone = 250 * time.Millisecond

// charge charges src, and says how long it has to wait: not at all while it is alone, since then nobody gains by it. Waits also
// cost the daemon more than they save: each ends in a thread that is woken for one request.
func (s *shares) charge(src *source, now time.Time, cost time.Duration) (wait time.Duration) {
	if last := s.last.Load(); last != src {
		s.last.Store(src)
		if last != nil && last.ip != src.ip { // or it was forgotten meanwhile, and is the same
			s.turn.Store(now.UnixNano())
		}
	}
	wait = src.charge(now, cost)
	if now.UnixNano()-s.turn.Load() > int64(alone) {
		return 0
	}
	return wait
}

// acquire counts a connection of ip, or refuses it. When all are in use, one of the source that has the most makes room: the
// one that was answered the longest ago. It is no longer counted; the caller closes it.
func (s *shares) acquire(c *conn, ip netip.Addr, now time.Time) (ok bool, evicted *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep(now)
	src := s.sources[ip]
	n := 0
	if src != nil {
		n = len(src.conns)
	}
	if n >= s.maxPerIP {
		return false, nil
	}
	if s.total >= s.max {
		if src != nil && src.owes(now) {
			return false, nil // before anybody makes room for it; while there is room, it may be alone
		}
		if evicted = s.greediest(n).oldest(); evicted == nil {
			return false, nil
		}
		s.remove(evicted)
	}
	if src == nil {
		src = &source{ip: ip, conns: map[*conn]struct{}{}}
		s.sources[ip] = src
	}
	c.source = src
	src.conns[c] = struct{}{}
	s.total++
	return true, evicted
}

// greediest is the source with the most connections; nil when none has more than n.
func (s *shares) greediest(n int) (most *source) {
	for _, src := range s.sources {
		if len(src.conns) > n {
			most, n = src, len(src.conns)
		}
	}
	return most
}

// oldest is the connection that was answered, or else accepted, the longest ago.
func (s *source) oldest() (oldest *conn) {
	if s == nil {
		return nil
	}
	first := int64(math.MaxInt64)
	for c := range s.conns {
		if at := c.served.Load(); at < first {
			oldest, first = c, at
		}
	}
	return oldest
}

// release may come more than once, and after an eviction.
func (s *shares) release(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(c)
}

func (s *shares) remove(c *conn) {
	if _, ok := c.source.conns[c]; !ok {
		return
	}
	delete(c.source.conns, c)
	s.total--
	if c.perRead == 0 && c.served.Load() == c.accepted { // nobody was answered on it; with perRead answers are not noted
		c.source.charge(time.Now(), costRefusal)
	}
	// A source that still has to pay is kept, or reconnecting would make it forget.
	if len(c.source.conns) == 0 && (c.source.used.Load() <= time.Now().UnixNano() || len(s.sources) > maxRateKeys) {
		delete(s.sources, c.source.ip)
	}
}

// sweep forgets, once a second, the sources that have neither connections nor anything to pay.
func (s *shares) sweep(now time.Time) {
	if now.Sub(s.swept) < time.Second {
		return
	}
	s.swept = now
	for ip, src := range s.sources {
		if len(src.conns) == 0 && src.used.Load() <= now.UnixNano() {
			delete(s.sources, ip)
		}
	}
}

// Bytes that the kernel keeps of what was not read yet on a connection, and of what the peer does not read; it doubles them.
const (
	receiveBuffer = maxHeaderBytes
	sendBuffer    = 32 << 10 // several of the longest documents
)

// boundBuffers keeps clients that never read, or that send faster than is read, from making the kernel's buffers grow: it
// would charge their megabytes to the daemon. Nor are they kept for who does not acknowledge. Connections inherit what their listener
// has.
func boundBuffers(l net.Listener) error {
	return control(l, func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacknowledged.Milliseconds())))
	})
}

// listener closes at once what exceeds the shares, so that one pod's connections never keep another's from being accepted.
type listener struct {
	net.Listener
	shares   *shares
	accepted func(time.Time) // every connection, also one that is closed at once
	refused  func()
	plain    bool          // no Host is completed
	perRead  time.Duration // charged for every read
}

// LimitListener shares max connections among the source IPs, at most maxPerIP each, as Serve does with those of its own
// listeners, and lets a source read two hundred times a second: it is for an operator's port that pods can reach too. On a
// loopback address only peers with such an address are accepted: a node that routes 127.0.0.0/8, as kube-proxy sets it,
// takes packets of pods there.
func LimitListener(l net.Listener, limit, limitPerIP int) net.Listener {
	return &listener{
		Listener: l, shares: newShares(limit, limitPerIP), accepted: func(time.Time) {}, refused: func() {},
		plain: true, perRead: 5 * time.Millisecond,
	}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		tcp, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		now := time.Now()
		l.accepted(now)
		c := &conn{Conn: tcp, shares: l.shares, off: l.plain, perRead: l.perRead, accepted: now.UnixNano()}
		c.served.Store(c.accepted)
		peer := addrOf(tcp.RemoteAddr())
		if l.plain && addrOf(tcp.LocalAddr()).IsLoopback() && !peer.IsLoopback() {
			l.refuse(tcp)
			continue
		}
		ok, evicted := c.shares.acquire(c, peer, now)
		if evicted != nil {
			l.refuse(evicted.Conn)
		}
		if ok {
			c.wait = c.shares.charge(c.source, now, costConn)
			if c.wait < maxWait {
				return c, nil
			}
			c.shares.release(c)
		}
		l.refuse(tcp)
	}
}

func (l *listener) refuse(c net.Conn) {
	l.refused()
	reset(c) // no TIME_WAIT for a flood
}

// pay charges the connection's source for an answer.
func (c *conn) pay(label handlerLabel, failed bool, now time.Time) {
	cost := costAnswer
	switch {
	case failed:
		cost = costRefusal
	case label == handlerToken:
		cost = costToken
	}
	c.served.Store(now.UnixNano())
	c.wait = c.shares.charge(c.source, now, cost)
}

// connState lets a connection whose source has used up its time wait for its next request. Others of the source have waits of
// their own, one behind the other: so nobody waits longer than all its connections together are worth. And it tells deadlines
// what a connection is at.
func connState(nc net.Conn, state http.ConnState) {
	c, ok := nc.(*conn)
	if !ok {
		return
	}
	if state == http.StateIdle && c.wait > 0 {
		time.Sleep(c.wait)
	}
	c.deadlines.state.Store(int32(state))
}
