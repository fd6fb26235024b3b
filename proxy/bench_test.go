package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/imdsgate/imdsgate/cache"
)

// one is a CallerFinder and CredentialSource with one pod, whose credentials are there.
type one struct {
	caller *Caller
	creds  *cache.Credentials
}

func (o one) Find(netip.Addr) (*Caller, error)                          { return o.caller, nil }
func (o one) Wait(context.Context, netip.Addr) (*Caller, error)         { return o.caller, nil }
func (o one) Peek(*cache.Key, *cache.Ref, time.Time) *cache.Credentials { return o.creds }
func (o one) Get(context.Context, cache.Key) (*cache.Credentials, error) {
	return o.creds, nil
}

// issuedBy returns what a real cache has for the grants.
func issuedBy(t testing.TB, grants ...*Grant) []*cache.Credentials {
	t.Helper()
	c := cache.New(cache.Options{Issuer: &issuer{calls: map[string]int{}}, Live: (&lab{callers: newCallers()}).live, Encode: Encode})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	var all []*cache.Credentials
	for _, g := range grants {
		creds, err := c.Get(ctx, g.Key)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, creds)
	}
	return all
}

// newHit returns a Server whose pod's credentials are there.
func newHit(t testing.TB) *Server {
	t.Helper()
	creds := issuedBy(t, grant("team/my-role"))[0]
	pod := caller("role", grant("team/my-role"), nil)
	pod.Since = time.Now().Add(-time.Hour)
	o := one{pod, creds}
	s, err := NewServer(Options{Callers: o, Credentials: o, TokenKey: make([]byte, 32), IMDSv1: true, Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sink is a ResponseWriter that is used again and again.
type sink struct {
	header http.Header
	code   int
	n      int
}

func (s *sink) Header() http.Header { return s.header }
func (s *sink) WriteHeader(code int) {
	s.code = code
}
func (s *sink) Write(p []byte) (int, error)       { s.n += len(p); return len(p), nil }
func (s *sink) WriteString(p string) (int, error) { s.n += len(p); return len(p), nil }

// parsed is a request as net/http hands it to the handler.
func parsed(t testing.TB, text string) *http.Request {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
	if err != nil {
		t.Fatal(err)
	}
	ctx := withPeer(t.Context(), newFed(nil, 1))
	return r.WithContext(ctx)
}

func hits(t testing.TB, s *Server) map[string]*http.Request {
	t.Helper()
	token := tokenHeader + ": " + s.tokens.issue(netip.MustParseAddr("127.0.0.2"), time.Now(), time.Hour) + "\r\n"
	return map[string]*http.Request{
		"list":                parsed(t, "GET "+roleList+"/ HTTP/1.1\r\n"+hostLine+"\r\n"),
		"list with token":     parsed(t, "GET "+roleList+"/ HTTP/1.1\r\n"+hostLine+token+"\r\n"),
		"document":            parsed(t, "GET "+roleList+"/my-role HTTP/1.1\r\n"+hostLine+"\r\n"),
		"document with token": parsed(t, "GET "+roleList+"/my-role HTTP/1.1\r\n"+hostLine+token+"\r\n"),
	}
}

func TestHitAllocatesNothing(t *testing.T) {
	s := newHit(t)
	h := s.Handler()
	for name, r := range hits(t, s) {
		w := &sink{header: http.Header{}}
		n := testing.AllocsPerRun(1000, func() {
			clear(w.header)
			w.n = 0
			h.ServeHTTP(w, r)
		})
		if n != 0 && !raceEnabled { // the race detector makes sync.Pool forget
			t.Errorf("%s: %v allocations", name, n)
		}
		if w.code != 200 || w.n < 7 {
			t.Errorf("%s: %d, %d bytes", name, w.code, w.n)
		}
	}
}

// BenchmarkCredentialsHit is the handler alone.
func BenchmarkCredentialsHit(b *testing.B) {
	s := newHit(b)
	h := s.Handler()
	for name, r := range hits(b, s) {
		b.Run(strings.ReplaceAll(name, " ", "-"), func(b *testing.B) {
			w := &sink{header: http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.header)
				h.ServeHTTP(w, r)
			}
		})
	}
}

// BenchmarkAgainstBareHandler asks for the document over one loopback connection, in turn from Serve and from a net/http
// server whose handler does nothing but write the same headers and bytes. cpu/bare is the ratio of the CPU time of the
// whole process per request, client included.
func BenchmarkAgainstBareHandler(b *testing.B) {
	s := newHit(b)
	document := s.credentials.Peek(nil, nil, time.Now()).Document()
	bare := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Set("Server", "EC2ws")
		h.Set("Content-Type", "text/plain")
		h.Set("Content-Length", fmt.Sprint(len(document)))
		_, _ = w.Write(document)
	})
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	ours, theirs := listen(b), listen(b)
	go func() { _ = s.Serve(ctx, ours) }()
	hs := &http.Server{Handler: bare, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: readHeaderTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout}
	go func() { _ = hs.Serve(theirs) }()
	defer hs.Close()
	request := "GET " + roleList + "/my-role HTTP/1.1\r\n" + hostLine + tokenHeader + ": " +
		s.tokens.issue(netip.MustParseAddr("127.0.0.2"), time.Now(), time.Hour) + "\r\nUser-Agent: Botocore/1.29.27 Python/3.11.2 Linux/6.1\r\nAccept-Encoding: identity\r\n\r\n"
	type client struct {
		net.Conn
		buf []byte
		cpu time.Duration
	}
	dialed := func(ln net.Listener) *client {
		return &client{Conn: dial(b, ln.Addr().String(), podIPs["role"]), buf: make([]byte, 64<<10)}
	}
	ask := func(c *client) {
		if _, err := io.WriteString(c, request); err != nil {
			b.Fatal(err)
		}
		for n := 0; ; {
			m, err := c.Read(c.buf[n:])
			if err != nil {
				b.Fatal(err)
			}
			n += m
			if n > len(document) && c.buf[n-1] == '}' {
				return
			}
		}
	}
	a, z := dialed(ours), dialed(theirs)
	_ = a.SetDeadline(time.Time{})
	_ = z.SetDeadline(time.Time{})
	const batch = 200
	rounds := 0
	for b.Loop() {
		rounds++
		for _, c := range []*client{a, z} {
			before := cpuTime(b)
			for range batch {
				ask(c)
			}
			c.cpu += cpuTime(b) - before
		}
	}
	b.ReportMetric(float64(a.cpu.Nanoseconds())/float64(rounds*batch), "cpu-ns/request")
	b.ReportMetric(float64(z.cpu.Nanoseconds())/float64(rounds*batch), "bare-cpu-ns/request")
	b.ReportMetric(float64(a.cpu)/float64(z.cpu), "cpu/bare")
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
