package proxy

import (
	"net"
	"net/netip"
	"sync"
	"time"
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

// connCount counts the open connections, in all and by source IP.
type connCount struct {
	max, maxPerIP int

	mu    sync.Mutex
	total int
	perIP map[netip.Addr]int
}

func newConnCount(limit, limitPerIP int) *connCount {
	return &connCount{max: limit, maxPerIP: limitPerIP, perIP: map[netip.Addr]int{}}
}

func (c *connCount) acquire(ip netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total >= c.max || c.perIP[ip] >= c.maxPerIP {
		return false
	}
	c.total++
	c.perIP[ip]++
	return true
}

func (c *connCount) release(ip netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total--
	if c.perIP[ip]--; c.perIP[ip] == 0 {
		delete(c.perIP, ip)
	}
}

// listener closes at once what exceeds the limits, so that one pod's connections never keep another's from being accepted.
type listener struct {
	net.Listener
	server *Server
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.server.accepted.Store(time.Now().UnixNano())
		ip := addrOf(c.RemoteAddr())
		if l.server.conns.acquire(ip) {
			return &conn{Conn: c, release: sync.OnceFunc(func() { l.server.conns.release(ip) })}, nil
		}
		l.server.metrics.denied[reasonConnections].Inc()
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // no TIME_WAIT for a flood
		}
		_ = c.Close()
	}
}
