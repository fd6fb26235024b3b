package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// endpoint answers as the metadata endpoint does for one role.
type endpoint struct {
	*httptest.Server
	addr  netip.AddrPort
	conns atomic.Int64

	mu    sync.Mutex
	asked map[string]int
	stall time.Duration // of the next document
	list  int           // status of the role list; 0: 200
}

func serve(t *testing.T) *endpoint {
	e := &endpoint{asked: map[string]int{}}
	e.Server = httptest.NewUnstartedServer(e)
	e.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			e.conns.Add(1)
		}
	}
	e.Start()
	t.Cleanup(e.Close)
	e.addr = netip.MustParseAddrPort(e.Listener.Addr().String())
	return e
}

func (e *endpoint) set(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
}

func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	what := fmt.Sprintf("%s %s %q", r.Method, strings.TrimPrefix(r.URL.Path, "/latest/"), r.Header.Get("X-aws-ec2-metadata-token"))
	e.asked[what]++
	stall, list := time.Duration(0), e.list
	if strings.HasSuffix(r.URL.Path, "my-role") {
		stall, e.stall = e.stall, 0
	}
	e.mu.Unlock()
	switch {
	case r.Host != "169.254.169.254":
		http.Error(w, "host", http.StatusForbidden)
	case r.URL.Path == "/latest/api/token" && r.Method == http.MethodPut:
		fmt.Fprint(w, "TOKEN")
	case r.URL.Path == rolePath:
		if list != 0 {
			w.WriteHeader(list)
		}
		fmt.Fprint(w, "my-role\n")
	case r.URL.Path == rolePath+"my-role":
		time.Sleep(stall)
		fmt.Fprint(w, `{"Code":"Success"}`)
	default:
		http.NotFound(w, r)
	}
}

func run(t *testing.T, o Options) *Result {
	t.Helper()
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if int64(r.Latency.TotalCount()) > r.Operations || r.Failed > r.Operations {
		t.Errorf("%d latencies and %d failures of %d operations", r.Latency.TotalCount(), r.Failed, r.Operations)
	}
	return r
}

func TestSequences(t *testing.T) {
	const n = 20
	const list, doc = "GET meta-data/iam/security-credentials/", "GET meta-data/iam/security-credentials/my-role"
	for _, tt := range []struct {
		name  string
		o     Options
		asked map[string]int
		conns int64
	}{
		{"full v2", Options{}, map[string]int{`PUT api/token ""`: n, list + ` "TOKEN"`: n, doc + ` "TOKEN"`: n}, n},
		{"full v2, a connection per request", Options{Reuse: PerRequest}, map[string]int{`PUT api/token ""`: n, list + ` "TOKEN"`: n, doc + ` "TOKEN"`: n}, 3 * n},
		{"full v1", Options{Version: 1}, map[string]int{list + ` ""`: n, doc + ` ""`: n}, n},
		{"document", Options{Sequence: Document, Reuse: Keep, Connections: 1}, map[string]int{`PUT api/token ""`: 1, list + ` "TOKEN"`: 1, doc + ` "TOKEN"`: n}, 2},
		{"document v1", Options{Sequence: Document, Reuse: Keep, Connections: 1, Version: 1}, map[string]int{list + ` ""`: 1, doc + ` ""`: n}, 2},
		{"document of a given role", Options{Sequence: Document, Reuse: Keep, Connections: 1, Version: 1, Role: "my-role"}, map[string]int{doc + ` ""`: n}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := serve(t)
			tt.o.Endpoint, tt.o.Rate, tt.o.Duration, tt.o.Warmup = e.addr, 200, 3*n/4*5*time.Millisecond, n/4*5*time.Millisecond
			r := run(t, tt.o)
			if r.Operations != 3*n/4 || r.Failed != 0 || r.Latency.TotalCount() != r.Operations {
				t.Errorf("%d operations, %d failed (%v), %d latencies; want %d good ones", r.Operations, r.Failed, r.Errors, r.Latency.TotalCount(), 3*n/4)
			}
			e.mu.Lock()
			defer e.mu.Unlock()
			if diff := cmp.Diff(tt.asked, e.asked); diff != "" {
				t.Errorf("asked (-want +got):\n%s", diff)
			}
			if got := e.conns.Load(); got != tt.conns {
				t.Errorf("%d connections, want %d", got, tt.conns)
			}
		})
	}
}

// A stall of 300 ms delays every operation that was due in it: with one connection and 200 operations a second these are 60,
// whose mean wait is half the stall. A loop that waits for its answers would have counted one.
func TestCoordinatedOmission(t *testing.T) {
	e := serve(t)
	e.set(func() { e.stall = 300 * time.Millisecond })
	r := run(t, Options{Endpoint: e.addr, Sequence: Document, Reuse: Keep, Connections: 1, Rate: 200, Duration: time.Second})
	slow := int64(0)
	for _, b := range r.Latency.Distribution() {
		if b.From > int64(50*time.Millisecond) {
			slow += b.Count
		}
	}
	if r.Operations != 200 || slow < 40 {
		t.Errorf("of %d operations %d took longer than 50 ms, want about 50", r.Operations, slow)
	}
	if late := Summarize(r.Lateness); late.P50 > 0.1 {
		t.Errorf("the endpoint's stall was taken for the generator's lateness: %+v", late)
	}
}

func TestWant(t *testing.T) {
	e := serve(t)
	e.set(func() { e.list = http.StatusForbidden })
	o := Options{Endpoint: e.addr, Rate: 200, Duration: 50 * time.Millisecond, Want: http.StatusForbidden}
	if r := run(t, o); r.Failed != 0 || r.Operations != 10 {
		t.Errorf("a refusal that was wanted is a failure: %v", r.Errors)
	}
	o.Want = 0
	if diff := cmp.Diff(map[string]int64{"status 403": 10}, run(t, o).Errors); diff != "" {
		t.Error(diff)
	}
	o.Sequence, o.Role, o.Want = Document, "other", http.StatusNotFound
	if r := run(t, o); r.Failed != 0 || r.Operations != 10 {
		t.Errorf("a refused document that was wanted is a failure: %v", r.Errors)
	}
}

func TestFailures(t *testing.T) {
	answer := func(f func(net.Conn)) netip.AddrPort {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = c.Read(make([]byte, 4096))
					f(c)
				}()
			}
		}()
		return netip.MustParseAddrPort(l.Addr().String())
	}
	free := answer(func(net.Conn) {})
	for name, tt := range map[string]struct {
		endpoint netip.AddrPort
		want     map[string]int64
	}{
		"nobody listens": {netip.MustParseAddrPort("127.0.0.1:1"), map[string]int64{"refused": 10}},
		"no answer":      {free, map[string]int64{"timeout": 2, "no connection in time": 8}},
		"no HTTP":        {answer(func(c net.Conn) { fmt.Fprint(c, "SSH-2.0-x\r\n\r\n\r\n") }), map[string]int64{"malformed": 10}},
		"no length":      {answer(func(c net.Conn) { fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\nbody") }), map[string]int64{"malformed": 10}},
		"too much":       {answer(func(c net.Conn) { fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nbody") }), map[string]int64{"malformed": 10}},
		"cut short":      {answer(func(c net.Conn) { fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody"); c.Close() }), map[string]int64{"cut": 10}},
		"endless":        {answer(func(c net.Conn) { fmt.Fprint(c, strings.Repeat("x", maxAnswer)) }), map[string]int64{"too long": 10}},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{Endpoint: tt.endpoint, Rate: 1000, Duration: 10 * time.Millisecond, Connections: 10, Timeout: time.Second}
			if name == "no answer" {
				o.Connections, o.Timeout = 1, 100*time.Millisecond
			}
			r := run(t, o)
			if name == "no answer" { // how many begin before the end is the clock's business
				if r.Failed != 10 || r.Errors[timedOut]+r.Errors[unserved] != 10 || r.Errors[timedOut] == 0 || r.Latency.TotalCount() != 10 {
					t.Errorf("%v, %d latencies", r.Errors, r.Latency.TotalCount())
				}
				return
			}
			if diff := cmp.Diff(tt.want, r.Errors); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	e := serve(t)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Run(ctx, Options{Endpoint: e.addr, Rate: 100, Duration: time.Hour}); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
}

func TestOptions(t *testing.T) {
	good := Options{Rate: 1, Duration: time.Second}
	if _, err := good.complete(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Options){
		"no rate":     func(o *Options) { o.Rate = 0 },
		"no duration": func(o *Options) { o.Duration = 0 },
		"sequence":    func(o *Options) { o.Sequence = "x" },
		"version":     func(o *Options) { o.Version = 3 },
		"reuse":       func(o *Options) { o.Reuse = "x" },
		"connections": func(o *Options) { o.Connections = maxConnections + 1 },
		"role":        func(o *Options) { o.Role = "x\r\nHost: y" },
	} {
		o := good
		change(&o)
		if _, err := Run(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestJSON(t *testing.T) {
	e := serve(t)
	text, err := json.Marshal(run(t, Options{Endpoint: e.addr, Rate: 200, Duration: 100 * time.Millisecond}))
	if err != nil {
		t.Fatal(err)
	}
	var got JSON
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if got.Operations != 20 || got.Latency.P50 <= 0 || got.Latency.P50 > got.Latency.Max || len(got.Curve) == 0 || got.Errors == nil {
		t.Errorf("%s", text)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"))
	f.Add([]byte("HTTP/1.1 200\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok, err := parse(b)
		if ok && (err != nil || len(r.body) > len(b)) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}
