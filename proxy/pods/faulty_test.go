package pods

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
)

// An API server that ends every watch at once is not asked again and again without a pause: client-go would, and so would every
// other node's daemon.
func TestFaultyWatches(t *testing.T) {
	for name, fault := range map[string]func(http.ResponseWriter){
		"an event 410": func(w http.ResponseWriter) {
			_, _ = w.Write([]byte(`{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}}` + "\n"))
		},
		"an answer 410": func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusGone)
			_, _ = w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}`))
		},
		"an event 500": func(w http.ResponseWriter) {
			_, _ = w.Write([]byte(`{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"InternalError","code":500}}` + "\n"))
		},
		"one bookmark": func(w http.ResponseWriter) {
			_, _ = w.Write([]byte(`{"type":"BOOKMARK","object":{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"7","annotations":{"k8s.io/initial-events-end":"true"}}}}` + "\n"))
		},
		"nothing": func(http.ResponseWriter) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			shop(a)
			a.put(podOf("a", "cart", []string{"10.0.0.1"}))
			var faulty atomic.Bool
			faulty.Store(true)
			var watches atomic.Int32
			front := inFront(t, a, func(w http.ResponseWriter, r *http.Request) bool {
				if !faulty.Load() || r.URL.Query().Get("watch") == "" {
					return false
				}
				watches.Add(1)
				w.Header().Set("Content-Type", "application/json")
				fault(w)
				return true
			})
			h := newHarness(t, a, testPolicy())
			h.client = clientOf(t, front)
			h.backoff = &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 1, Steps: 1000, Cap: time.Second}
			h.run(t)
			time.Sleep(time.Second)
			// Of the pods, a service account and a namespace: two each at once, and then one a pause.
			if n := watches.Load(); n > 40 {
				t.Errorf("%d watches in a second with pauses of 200 ms", n)
			}
			faulty.Store(false)
			mustWait(t, h.Pods, "10.0.0.1")
		})
	}
}

// What an API server says about when to ask again is not believed, nor that it will answer at all.
func TestFaultyAnswers(t *testing.T) {
	for name, fault := range map[string]func(http.ResponseWriter, *http.Request){
		"come back in a day": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "86400")
			w.WriteHeader(http.StatusTooManyRequests)
		},
		"no answer": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		for mode, watchList := range map[string]bool{"watch-list": true, "list and watch": false} {
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				a := newAPIServer(t)
				a.watchList = watchList
				shop(a)
				a.put(podOf("a", "cart", []string{"10.0.0.1"}))
				var asked atomic.Int32
				front := inFront(t, a, func(w http.ResponseWriter, r *http.Request) bool {
					if asked.Add(1) > 12 {
						return false
					}
					fault(w, r)
					return true
				})
				h := newHarness(t, a, testPolicy())
				h.client = clientOf(t, front)
				h.openTimeout, h.listTimeout = 100*time.Millisecond, 100*time.Millisecond
				if h.NodeExists(t.Context()) == nil || h.RemoveTaint(t.Context(), "example.com/taint") == nil {
					t.Error("no error")
				}
				h.run(t)
				mustWait(t, h.Pods, "10.0.0.1")
				if log := h.log.String(); name == "no answer" && (!strings.Contains(log, "does not answer within 100ms") || strings.Contains(log, "canceled")) {
					t.Errorf("the log does not say why:\n%s", log)
				}
			})
		}
	}
}

// A watch that stays open and tells nothing is asked for again when its time is over.
func TestSilentWatches(t *testing.T) {
	for mode, watchList := range map[string]bool{"watch-list": true, "list and watch": false} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			a.watchList = watchList
			shop(a)
			a.put(podOf("a", "cart", []string{"10.0.0.1"}))
			var silent atomic.Pointer[atomic.Bool] // of the watches that are opened now
			silent.Store(new(atomic.Bool))
			front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				a.ServeHTTP(muted{w, silent.Load()}, r)
			}))
			t.Cleanup(func() {
				a.disconnect()
				front.CloseClientConnections()
				front.Close()
			})
			h := newHarness(t, a, testPolicy())
			h.client = clientOf(t, front)
			h.minWatch, h.openTimeout = time.Second, time.Second
			h.run(t)
			if c := mustWait(t, h.Pods, "10.0.0.1"); c.Grant == nil {
				t.Fatalf("no role: %+v", c)
			}
			silent.Swap(new(atomic.Bool)).Store(true)
			a.put(podOf("b", "cart", []string{"10.0.0.2"}))
			a.put(account("cart"))
			poll(t, "the new pod, and the role that is gone", func() bool {
				b, err := h.Find(addr("10.0.0.2"))
				return err == nil && b.Grant == nil
			})
		})
	}
}

// muted answers as long as it is not silent.
type muted struct {
	http.ResponseWriter
	silent *atomic.Bool
}

func (m muted) Write(p []byte) (int, error) {
	if m.silent.Load() {
		return len(p), nil
	}
	return m.ResponseWriter.Write(p)
}

func (m muted) Flush() { m.ResponseWriter.(http.Flusher).Flush() }

// Nobody is followed elsewhere: client-go would send the token along, to whatever host and without TLS.
func TestNoRedirects(t *testing.T) {
	var got atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { got.Add(1) }))
	t.Cleanup(elsewhere.Close)
	a := newAPIServer(t)
	a.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
	})
	h := newHarness(t, a, testPolicy())
	h.run(t)
	poll(t, "the refusal", func() bool { return h.Err() != nil })
	if err := h.Err().Error(); !strings.Contains(err, "redirects to "+elsewhere.URL) {
		t.Errorf("said: %s", err)
	}
	_, _ = h.Token(t.Context(), "shop", "cart", "sts.amazonaws.com")
	_ = h.NodeExists(t.Context())
	_ = h.CanReport(t.Context())
	if n := got.Load(); n > 0 {
		t.Errorf("%d requests were sent elsewhere", n)
	}
}

// inFront is a server that answers what fault does not with a's answers.
func inFront(t *testing.T, a *apiServer, fault func(http.ResponseWriter, *http.Request) bool) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !fault(w, r) {
			a.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		a.disconnect()
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func clientOf(t *testing.T, s *httptest.Server) *rest.RESTClient {
	t.Helper()
	client, _, err := newClient(&rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	return client
}
