package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func newReader(c net.Conn) *bufio.Reader { return bufio.NewReader(c) }

// stuck is a CallerFinder that blocks until the test ends.
type stuck struct{ ctx context.Context }

func (s stuck) Find(netip.Addr) (*Caller, error) { return nil, ErrNotSynced }
func (s stuck) Wait(context.Context, netip.Addr) (*Caller, error) {
	<-s.ctx.Done() // ignores even the request's deadline
	return nil, ErrNotSynced
}

func TestTokenPutDependsOnNothing(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Callers = stuck{t.Context()} })
	for range 50 { // as many requests as can be are stuck
		c := dial(t, l.addr, podIPs["other"])
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
	}
	onTime(t, "two tokens", func() bool {
		start := time.Now()
		l.token(t, "role", "21600")
		l.token(t, "other", "21600")
		return time.Since(start) > 100*time.Millisecond+slack
	})
}

// 500 PUTs at once from 50 pods.
func TestTokenPutFlood(t *testing.T) {
	l := newLab(t)
	onTime(t, "more than 5 of 500", func() bool {
		var slow atomic.Int64
		var wg sync.WaitGroup
		for i := range 50 {
			ip := netip.AddrFrom4([4]byte{127, 0, 1, byte(i)})
			for range 10 {
				c := dial(t, l.addr, ip)
				wg.Go(func() {
					defer c.Close()
					start := time.Now()
					fmt.Fprintf(c, "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n%s: 300\r\nContent-Length: 0\r\n\r\n", tokenTTLHeader)
					r, err := readReply(newReader(c), "PUT")
					if err != nil || r.StatusCode != 200 {
						t.Errorf("%v %v", r, err)
					}
					if time.Since(start) > 250*time.Millisecond+slack {
						slow.Add(1)
					}
				})
			}
		}
		wg.Wait()
		return slow.Load() > 5
	})
}

// 2,000 connections from one pod: what exceeds its share is closed, another pod is served meanwhile, and all memory of it
// goes with the connections.
func TestConnectionsPerIP(t *testing.T) {
	l := newLab(t, func(o *Options) { o.MaxConnectionsPerIP = 100 })
	l.warm(t, "role")
	var open []net.Conn
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: podIPs["other"].AsSlice()}}
	for range 2000 {
		if c, err := d.Dial("tcp4", l.addr); err == nil {
			open = append(open, c)
		} else if !errors.Is(err, syscall.ECONNRESET) { // the surplus one, closed already
			t.Fatal(err)
		}
	}
	if r := l.get(t, "role", roleList+"/my-role"); r.StatusCode != 200 {
		t.Errorf("another pod: %d %s", r.StatusCode, r.body)
	}
	if n := l.conns.of(podIPs["other"]); n != 100 {
		t.Errorf("%d connections are held", n)
	}
	for _, c := range open {
		_ = c.Close()
	}
	eventually(t, func() bool { return l.conns.of(podIPs["other"]) == 0 && l.conns.len() == 0 })
	if r := l.get(t, "other", "/"); r.StatusCode != 200 {
		t.Errorf("afterwards: %d", r.StatusCode)
	}
}

// All connections are in use: whoever has less than another gets one of the greediest's, the one that was answered the longest
// ago; the greediest gets no more.
func TestConnectionsInAll(t *testing.T) {
	l := newLab(t, func(o *Options) { o.MaxConnections = 10 })
	l.warm(t, "role")
	greedy, modest := podIPs["other"], podIPs["special"]
	ask := func(c net.Conn) error {
		fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
		_, err := readReply(newReader(c), "GET")
		return err
	}
	var hoard []net.Conn
	for range 8 {
		hoard = append(hoard, dial(t, l.addr, greedy))
	}
	for range 2 {
		dial(t, l.addr, modest)
	}
	eventually(t, func() bool { return l.conns.of(greedy) == 8 && l.conns.of(modest) == 2 })
	for i, c := range hoard {
		if i != 5 {
			if err := ask(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: greedy.AsSlice()}}
	if c, err := d.Dial("tcp4", l.addr); err == nil { // or else it was closed already
		defer c.Close()
		if ask(c) == nil {
			t.Error("the greediest got one more")
		}
	}
	if r := l.get(t, "role", roleList+"/my-role"); r.StatusCode != 200 {
		t.Errorf("another pod: %d", r.StatusCode)
	}
	if err := ask(hoard[5]); err == nil {
		t.Error("the connection that was never answered is still there")
	}
	if err := ask(hoard[0]); err != nil {
		t.Errorf("a connection of the greediest that was answered: %v", err)
	}
	if n := l.conns.of(greedy) + l.conns.of(modest); n > 10 {
		t.Errorf("%d connections are held", n)
	}
}

// Forty pods that each want everything: a new pod is served all the same, every time.
func TestConnectionsOfManyGreedy(t *testing.T) {
	l := newLab(t, func(o *Options) { o.MaxConnections, o.MaxConnectionsPerIP = 200, 50 })
	l.warm(t, "role")
	for i := range 40 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i))}}
		for range 20 {
			if c, err := d.Dial("tcp4", l.addr); err == nil {
				defer c.Close()
			} else if !errors.Is(err, syscall.ECONNRESET) {
				t.Fatal(err)
			}
		}
		if r := l.get(t, "role", roleList+"/my-role"); r.StatusCode != 200 {
			t.Fatalf("with %d greedy pods: %d %s", i+1, r.StatusCode, r.body)
		}
	}
	eventually(t, func() bool { return l.conns.open() <= 200 })
	for i := range 40 { // each has about its share
		if n := l.conns.of(netip.AddrFrom4([4]byte{127, 0, 1, byte(i)})); n < 3 || n > 8 {
			t.Errorf("greedy pod %d has %d of 200 connections", i, n)
		}
	}
}

// An operator's port: a pod's connections and requests leave room for the next, and the loopback is for who is there.
func TestLimitListener(t *testing.T) {
	t.Parallel()
	ln := listen(t)
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })}
	go func() { _ = hs.Serve(LimitListener(ln, 20, 10)) }()
	t.Cleanup(func() { _ = hs.Close() })
	ask := func(c net.Conn) error {
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		_, err := readReply(newReader(c), "GET")
		return err
	}
	for _, greedy := range []string{"other", "denied"} {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: podIPs[greedy].AsSlice()}}
		for range 30 {
			if c, err := d.Dial("tcp4", ln.Addr().String()); err == nil {
				defer c.Close()
			}
		}
	}
	c := dial(t, ln.Addr().String(), podIPs["role"])
	start, n := time.Now(), 0
	for ; time.Since(start) < time.Second; n++ {
		if err := ask(c); err != nil {
			t.Fatal(err)
		}
	}
	if n < 10 || n > 300 {
		t.Errorf("%d requests in a second", n)
	}
	if err := ask(dial(t, ln.Addr().String(), podIPs["special"])); err != nil {
		t.Error(err)
	}
	fromAfar := &onceListener{Listener: ln, conn: &afar{newFed([]byte("GET / HTTP/1.1\r\n\r\n"), 1)}}
	if c, err := LimitListener(fromAfar, 20, 10).Accept(); err == nil {
		t.Errorf("a connection of %s is accepted on the loopback", c.RemoteAddr())
	}
}

// afar is a connection of a pod with the loopback.
type afar struct{ *fed }

func (afar) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 244, 0, 2), Port: 1} }

// onceListener accepts one connection, then fails.
type onceListener struct {
	net.Listener
	conn net.Conn
}

func (l *onceListener) Accept() (net.Conn, error) {
	c := l.conn
	if l.conn = nil; c == nil {
		return nil, net.ErrClosed
	}
	return c, nil
}

// A source is charged for what it does, waits for what it cannot pay, and owes nothing that is not its own.
func TestCharge(t *testing.T) {
	now := time.Now()
	s := &source{}
	n := 0
	for ; n < 1000 && s.charge(now, costRefusal) <= 0; n++ {
	}
	if n != int(credit/costRefusal) {
		t.Errorf("%d at once", n)
	}
	for range 10_000 {
		s.charge(now, costConn)
	}
	if w := s.charge(now, costConn); w != maxWait {
		t.Errorf("who owes most waits %v", w)
	}
	if w := s.charge(now.Add(credit+maxWait), costAnswer); w != costAnswer-credit {
		t.Errorf("when all is paid for, the wait is %v", w)
	}
}

// 13,000 hits a second are a load test, not an attack: no wait. Far more, or a loop of refusals, wait; nobody else does.
func TestBudgets(t *testing.T) {
	for name, tc := range map[string]struct {
		cost  time.Duration
		rate  int
		waits bool
	}{
		"hits": {costAnswer, 13_000, false}, "more hits": {costAnswer, 20_000, true}, "tokens": {costToken, 9_900, false},
		"connections": {costConn, 9_900, false}, "refusals": {costRefusal, 3_000, true},
	} {
		s, now, waited := &source{}, time.Now(), false
		for range 2 * tc.rate {
			now = now.Add(time.Second / time.Duration(tc.rate))
			waited = waited || s.charge(now, tc.cost) > 0
		}
		if waited != tc.waits {
			t.Errorf("%s: %d a second wait: %v", name, tc.rate, waited)
		}
	}
}

// A source that asks alone is charged and does not wait; from another's first request on it does, until that has been gone for a
// while.
func TestAloneWaitsForNobody(t *testing.T) {
	s, now := newShares(10, 10), time.Now()
	greedy, modest := &source{ip: podIPs["role"]}, &source{ip: podIPs["other"]}
	for range 10_000 {
		if w := s.charge(greedy, now, costAnswer); w != 0 {
			t.Fatalf("alone, a source waits %v", w)
		}
	}
	if w := s.charge(modest, now, costAnswer); w > 0 {
		t.Errorf("who asks once waits %v", w)
	}
	now = now.Add(alone / 2)
	if w := s.charge(greedy, now, costAnswer); w <= 0 {
		t.Error("with another one there, who has used up its time does not wait")
	}
	now = now.Add(alone)
	for range 10_000 {
		s.charge(greedy, now, costAnswer)
	}
	if w := s.charge(greedy, now.Add(time.Millisecond), costAnswer); w != 0 {
		t.Errorf("alone again, it waits %v", w)
	}
}

// Nor is a new connection refused while there is room, whatever its source has asked before.
func TestAloneIsNotRefused(t *testing.T) {
	s, now, c := newShares(10, 10), time.Now(), &conn{}
	s.acquire(c, podIPs["other"], now)
	for range 10_000 {
		s.charge(c.source, now, costAnswer)
	}
	if ok, _ := s.acquire(&conn{}, podIPs["other"], now); !ok || s.charge(c.source, now, costConn) != 0 {
		t.Error("a load test of one pod alone gets no further connection")
	}
}

// Who comes back after it was forgotten is not another.
func TestAloneAgain(t *testing.T) {
	s, now := newShares(10, 10), time.Now()
	for range 2 {
		c := &conn{shares: s, accepted: now.UnixNano()}
		s.acquire(c, podIPs["role"], now)
		for range 10_000 {
			if w := s.charge(c.source, now, costAnswer); w != 0 {
				t.Fatalf("alone, a source waits %v", w)
			}
		}
		c.served.Store(now.UnixNano() + 1)
		s.release(c)
		now = now.Add(2 * time.Second)
		s.sweep(now)
		if len(s.sources) != 0 {
			t.Fatal("it was not forgotten")
		}
	}
}

// Reconnecting does not make a source forget what it owes, and what it paid is forgotten.
func TestDebtOutlastsConnections(t *testing.T) {
	s, ip, now := newShares(10, 10), podIPs["other"], time.Now()
	useful := &conn{shares: s}
	s.acquire(useful, ip, now)
	useful.pay(handlerToken, false, now)
	s.release(useful)
	if useful.source.charge(now, 0) != costToken-credit {
		t.Errorf("a connection with one token costs %v", useful.source.charge(now, 0)+credit)
	}
	c := &conn{}
	s.acquire(c, ip, now)
	s.release(c)
	if wait := c.source.charge(now, 0); wait < costRefusal+costToken-credit {
		t.Errorf("a connection for nothing costs %v", wait+credit)
	}
	owes := c.source.charge(now, 0)
	c = &conn{perRead: time.Millisecond} // of an operator's port, where answers are not noted
	s.acquire(c, ip, now)
	s.release(c)
	if wait := c.source.charge(now, 0); wait != owes {
		t.Errorf("an operator's connection costs %v", wait-owes)
	}
	c = &conn{}
	s.acquire(c, ip, now)
	for range 5000 {
		c.source.charge(now, costRefusal)
	}
	s.release(c)
	s.release(c)
	for i := range 10 {
		s.acquire(&conn{}, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), now)
	}
	if ok, evicted := s.acquire(&conn{}, ip, now); ok || evicted != nil || s.total != 10 {
		t.Errorf("who owes gets a connection: %v, one of another is closed for it: %v; %d in all", ok, evicted != nil, s.total)
	}
	for _, src := range s.sources {
		for c := range src.conns {
			c.served.Store(1)
			s.release(c)
		}
	}
	again := &conn{}
	s.acquire(again, ip, now.Add(100*time.Millisecond))
	if again.source != c.source || s.total != 1 {
		t.Errorf("forgotten at once; %d connections", s.total)
	}
	again.served.Store(1)
	s.release(again)
	s.acquire(&conn{}, podIPs["role"], now.Add(2*time.Second))
	if len(s.sources) != 1 {
		t.Errorf("%d sources are known", len(s.sources))
	}
}

func (s *shares) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

func (s *shares) of(ip netip.Addr) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if src := s.sources[ip]; src != nil {
		return len(src.conns)
	}
	return 0
}

// len is the number of sources with connections.
func (s *shares) len() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, src := range s.sources {
		n += min(1, len(src.conns))
	}
	return n
}

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("did not happen in time")
		}
	}
}

// A client that loops on 401, as old CRTs do, is cut off; others do not notice.
func TestTokenRefusalLoop(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role")
	count := map[int]int{}
	c := dial(t, l.addr, podIPs["other"])
	br := newReader(c)
	start := time.Now()
	for n := 0; n < 1000 && time.Since(start) < 3*time.Second; n++ {
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\n%s: bad\r\n\r\n", roleList, tokenHeader)
		r, err := readReply(br, "GET")
		if err != nil {
			t.Fatal(err)
		}
		count[r.StatusCode]++
		if r.StatusCode == 503 {
			if !r.Close {
				t.Fatal("the connection is not closed")
			}
			c = dial(t, l.addr, podIPs["other"])
			br = newReader(c)
		}
	}
	elapsed := time.Since(start)
	if most := 50 + int(elapsed.Seconds()*50) + 1; count[401] < 50 || count[401] > most || count[503] == 0 {
		t.Errorf("%v in %v", count, elapsed)
	}
	if r := l.get(t, "role", roleList+"/", tokenHeader+": bad"); r.StatusCode != 401 {
		t.Errorf("another pod with a bad token: %d", r.StatusCode)
	}
	if r := l.get(t, "role", roleList+"/"); r.StatusCode != 200 {
		t.Errorf("another pod: %d", r.StatusCode)
	}
	if r := l.get(t, "other", roleList+"/", tokenHeader+": "+l.token(t, "other", "60")); r.StatusCode != 200 {
		t.Errorf("the same pod with a token: %d %s", r.StatusCode, r.body)
	}
}

func TestRateLimitsAreBounded(t *testing.T) {
	l := newRateLimits[int](10, 20)
	now := time.Now()
	for key := range 3 * maxRateKeys {
		l.allow(key, now)
	}
	if n := len(l.buckets); n != maxRateKeys {
		t.Errorf("%d keys", n)
	}
	if ok, _ := l.allow(1<<30, now); ok {
		t.Error("keys beyond the bound do not share one bucket")
	}
	now = now.Add(2 * time.Second)
	if ok, _ := l.allow(1<<30, now); !ok || len(l.buckets) != 1 {
		t.Errorf("%v, %d keys are left when all are idle", ok, len(l.buckets))
	}
	for range 40 {
		l.allow(1<<30, now)
	}
	if ok, suppressed := l.allow(1<<30, now.Add(100*time.Millisecond)); !ok || suppressed != 21 {
		t.Errorf("%v, suppressed %d", ok, suppressed)
	}
	for _, at := range []time.Duration{-time.Hour, 100 * time.Millisecond} {
		if ok, _ := l.allow(1<<30, now.Add(at)); ok {
			t.Error("a request from the past gives tokens")
		}
	}
}

// Heads that drip are cut off after 5 s, on a fresh connection and on one that has been used.
func TestSlowloris(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	var cases sync.WaitGroup
	for name, before := range map[string]string{
		"fresh": "", "used": "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", "without Host": "GET / HTTP/1.1\r\n\r\n",
	} {
		drips := func() (late bool) {
			c := dial(t, l.addr, podIPs["role"])
			br := newReader(c)
			if before != "" {
				fmt.Fprint(c, before)
				if _, err := readReply(br, "GET"); err != nil {
					t.Error(err)
				}
			}
			start := time.Now()
			drip, stop := context.WithCancel(t.Context())
			defer stop()
			go func() {
				fmt.Fprint(c, "GET / HTTP/1.1\r\nX-Slow: ")
				for drip.Err() == nil {
					if _, err := io.WriteString(c, "x"); err != nil {
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
			}()
			_, err := io.ReadAll(br)
			elapsed := time.Since(start)
			if errors.Is(err, os.ErrDeadlineExceeded) || elapsed < 4*time.Second {
				t.Errorf("%s: closed after %v: %v", name, elapsed, err)
			}
			return elapsed > 6*time.Second
		}
		cases.Go(func() { onTime(t, name, drips) })
	}
	cases.Wait()
}

// A body that is announced and never sent holds the connection for half a second, not for ever.
func TestBodyThatNeverComes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	onTime(t, "closed", func() bool {
		c := dial(t, l.addr, podIPs["role"])
		br := newReader(c)
		start := time.Now()
		fmt.Fprintf(c, "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n%s: 60\r\nContent-Length: 1000\r\n\r\n", tokenTTLHeader)
		if r, err := readReply(br, "PUT"); err != nil || r.StatusCode != 200 {
			t.Fatalf("%v %v", r, err)
		}
		checkThen(t, c, br, "closed")
		return time.Since(start) > 2*time.Second
	})
}

// Clients that leave in the middle of anything leave nothing behind.
func TestClientsThatLeave(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role")
	before := runtime.NumGoroutine()
	for i := range 200 {
		c := dial(t, l.addr, podIPs[[]string{"role", "unknown"}[i%2]])
		fmt.Fprintf(c, "GET %s/my-role HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
	eventually(t, func() bool { return l.conns.len() == 0 && runtime.NumGoroutine() <= before+2 })
	if n := len(l.logged.String()); n > 64<<10 {
		t.Errorf("%d bytes were logged", n)
	}
}

// Drain: whoever connects until the redirect has moved is served by the old one, whoever comes later by the new one, and
// nobody is refused.
func TestDrain(t *testing.T) {
	t.Parallel()
	before, after := newLab(t), newLab(t)
	for _, l := range []*lab{before, after} {
		l.warm(t, "role")
	}
	var target atomic.Pointer[string] // what the redirect leads to
	target.Store(&before.addr)
	stop, done := context.WithCancel(t.Context())
	defer done()
	var served, closed atomic.Int64
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for stop.Err() == nil {
				c := dial(t, *target.Load(), podIPs["role"])
				br := newReader(c)
				for range 3 { // keep-alive, until told to close
					fmt.Fprintf(c, "GET %s/my-role HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
					r, err := readReply(br, http.MethodGet)
					if err != nil || r.StatusCode != 200 {
						t.Errorf("refused: %v", err)
						break
					}
					served.Add(1)
					time.Sleep(5 * time.Millisecond)
					if r.Close {
						closed.Add(1)
						break
					}
				}
				_ = c.Close()
			}
		})
	}
	held := dial(t, before.addr, podIPs["unknown"]) // a request that is under way when the drain ends its accepting
	time.Sleep(200 * time.Millisecond)
	start := time.Now()
	before.stop()
	time.Sleep(1500 * time.Millisecond) // longer than the quiet second: connections still come
	target.Store(&after.addr)
	time.Sleep(800 * time.Millisecond)
	fmt.Fprintf(held, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
	if r, err := readReply(newReader(held), "GET"); err != nil || r.StatusCode != 503 || !r.Close {
		t.Errorf("the held request: %v %v", r, err)
	}
	if err := <-before.served; err != nil {
		t.Error(err)
	}
	if elapsed := time.Since(start); elapsed < 2*time.Second || elapsed > 5*time.Second+slack {
		t.Errorf("drained in %v", elapsed)
	}
	time.Sleep(100 * time.Millisecond)
	done()
	clients.Wait()
	if closed.Load() == 0 || served.Load() < 100 {
		t.Errorf("%d served, %d told to close", served.Load(), closed.Load())
	}
	if _, err := net.DialTimeout("tcp4", before.addr, time.Second); err == nil {
		t.Error("the drained one still accepts")
	}
}

func TestServeSeveralListeners(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ctx, stop := context.WithCancel(t.Context())
	lns := []net.Listener{listen(t), listen(t), listen(t)}
	served := make(chan error)
	go func() { served <- l.Serve(ctx, lns...) }()
	for _, ln := range lns {
		c := dial(t, ln.Addr().String(), podIPs["role"])
		fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
		if r, err := readReply(newReader(c), "GET"); err != nil || r.body != "latest" {
			t.Errorf("%v %v", r, err)
		}
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// Serve says so when a listener fails.
func TestServeFails(t *testing.T) {
	l := newLab(t)
	ln := listen(t)
	_ = ln.Close()
	if err := l.Serve(t.Context(), listen(t), ln); err == nil || !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
}
