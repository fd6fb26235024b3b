package pods

import (
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/rest"

	"github.com/imdsgate/imdsgate/proxy"
)

// A full node opens hundreds of watches at once: a few at a time, so that they share connections.
func TestWatchesAreOpenedAFewAtATime(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	var (
		mu            sync.Mutex
		opening, most int
	)
	a.Close()
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "true" && !strings.HasSuffix(r.URL.Path, "/pods") {
			mu.Lock()
			opening++
			most = max(most, opening)
			mu.Unlock()
			time.Sleep(2 * time.Millisecond) // as long as an API server takes: others come meanwhile
			w = &firstWrite{ResponseWriter: w, first: func() { mu.Lock(); defer mu.Unlock(); opening-- }}
		}
		a.ServeHTTP(w, r)
	}))
	a.put(namespace("shop"))
	for i := range 100 {
		a.put(account(fmt.Sprint("sa", i)), podOf(fmt.Sprint("p", i), fmt.Sprint("sa", i), nil))
	}
	start(t, a, testPolicy()).synced(t)
	mu.Lock()
	defer mu.Unlock()
	if most > 8 || most < 2 {
		t.Errorf("%d watches were being opened at one time, want 2 to 8", most)
	}
}

// firstWrite tells of the moment at which an answer begins.
type firstWrite struct {
	http.ResponseWriter
	once  sync.Once
	first func()
}

func (w *firstWrite) WriteHeader(code int) {
	w.once.Do(w.first)
	w.ResponseWriter.WriteHeader(code)
}

func (w *firstWrite) Write(b []byte) (int, error) {
	w.once.Do(w.first)
	return w.ResponseWriter.Write(b)
}

func (w *firstWrite) Flush() {
	w.once.Do(w.first)
	w.ResponseWriter.(http.Flusher).Flush()
}

// A stream that ends in order goes on where it ended: what happened meanwhile is seen, what did not change is not sent again.
func TestStreamGoesOn(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(podOf("a", "cart", []string{"10.0.0.1"}))
	h := start(t, a, testPolicy()).synced(t)
	time.Sleep(1100 * time.Millisecond) // one that ends sooner is taken for a failure, and begun anew
	h.flush()
	a.disconnect()
	a.put(account("cart"))
	h.until("the change", func() bool { return find(h.Pods, "10.0.0.1") == "a refused(0)" })
	a.delete(account("cart"))
	a.put(account("cart", proxy.AnnotationRoleARN, roleARN))
	h.until("the account that was made again", func() bool { return find(h.Pods, "10.0.0.1") == "a as cart" })
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := a.opened["list serviceaccounts metadata.name=cart"]; n != 0 {
		t.Errorf("%d lists", n)
	}
}

// A watch of one object is opened again as soon after an outage as that of the pods: what was annotated meanwhile counts within a
// minute.
func TestPausesEnd(t *testing.T) {
	t.Parallel()
	var longest time.Duration
	for range 20 {
		pauses := (&Pods{}).pauses()
		for range 30 {
			longest = max(longest, pauses.Step())
		}
	}
	if longest > time.Minute || longest < 30*time.Second {
		t.Errorf("the longest pause is %v", longest)
	}
}

// An open stream keeps nothing of its request, which has a token of a kilobyte and more, nor the answer's headers: a full node has 300
// of them.
func TestOpenStreamForgetsItsRequest(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(podOf("a", "cart", []string{"10.0.0.1"}))
	server := httptest.NewUnstartedServer(a)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(func() {
		a.disconnect()
		server.Close()
	})
	kept := &requests{}
	p, err := New(Options{
		Config: &rest.Config{
			Host: server.URL, BearerToken: strings.Repeat("t", 1000), WrapTransport: kept.wrap,
			TLSClientConfig: rest.TLSClientConfig{CAData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})},
		},
		Node: nodeName, Policy: testPolicy(), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{apiServer: a, Pods: p}
	h.run(t)
	h.synced(t)
	kept.mu.Lock()
	streams := len(kept.sent)
	kept.mu.Unlock()
	if streams != 2 {
		t.Fatalf("%d streams of single objects, want one of the service account and one of its namespace", streams)
	}
	for end := deadline(); kept.alive() > 0; {
		select {
		case <-end:
			t.Fatalf("%d of 2 requests and 2 answers' headers are still there", kept.alive())
		case <-time.After(10 * time.Millisecond):
			runtime.GC()
		}
	}
}

// requests remembers, without keeping, those for streams of single objects, and a header of each answer.
type requests struct {
	next    http.RoundTripper
	mu      sync.Mutex
	sent    []weak.Pointer[http.Request]
	headers []weak.Pointer[string]
}

func (q *requests) wrap(next http.RoundTripper) http.RoundTripper {
	q.next = next
	return q
}

func (q *requests) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := q.next.RoundTrip(r)
	if strings.Contains(r.URL.RawQuery, "metadata.name") && err == nil && resp.ProtoMajor == 2 {
		q.mu.Lock()
		q.sent = append(q.sent, weak.Make(r))
		q.headers = append(q.headers, weak.Make(&resp.Header["Content-Type"][0]))
		q.mu.Unlock()
	}
	return resp, err
}

func (q *requests) alive() (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range q.sent {
		if r.Value() != nil {
			n++
		}
	}
	for _, h := range q.headers {
		if h.Value() != nil {
			n++
		}
	}
	return n
}
