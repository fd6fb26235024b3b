package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

func TestRedaction(t *testing.T) {
	now := time.Now()
	v, err := newValue(NewCredentials("ASIAID", "sekrit/key", "sekrit/token", now, now.Add(time.Hour)), time.Hour, 0, now,
		func(c Credentials) []byte { return []byte("sekrit/document of " + c.SessionToken()) })
	if err != nil {
		t.Fatal(err)
	}
	creds := v.creds
	if creds.SecretAccessKey() != "sekrit/key" || creds.SessionToken() != "sekrit/token" || string(creds.Document()) != "sekrit/document of sekrit/token" {
		t.Fatal("the accessors do not tell what they should")
	}
	cached := New(Options{})
	cached.entries[testKey(1)] = &entry{key: testKey(1), value: v}
	holders := map[string]any{
		"credentials":        creds,
		"pointer":            &creds,
		"pointer to pointer": func() any { p := &creds; return &p }(),
		"unexported field":   struct{ c Credentials }{creds},
		"unexported pointer": struct{ c *Credentials }{&creds},
		"embedded":           struct{ Credentials }{creds},
		"deep":               struct{ s []map[string]struct{ c any } }{[]map[string]struct{ c any }{{"x": {creds}}}},
		"slice":              []Credentials{creds},
		"map":                map[string]*Credentials{"x": &creds},
		"any":                []any{creds, &creds},
		"error":              fmt.Errorf("wrapped: %w", &IssueError{Err: fmt.Errorf("%v %+v %#v", creds, &creds, creds)}),
		"value":              v,
		"entry":              *cached.entries[testKey(1)],
		"cache":              cached,
		"entries":            func() (all []Entry) { return append(all, collect(cached)...) }(),
		"secret":             *creds.secret,
		"secrets":            []secret{**creds.secret},
		"unexported secret":  struct{ s **secret }{creds.secret},
	}
	// Every form in which fmt could show a string or a []byte.
	var needles []string
	for _, s := range []string{"sekrit", "sekrit/key", "sekrit/token", "sekrit/document"} {
		needles = append(needles, s, fmt.Sprintf("%x", s), fmt.Sprintf("%X", s), strings.Trim(fmt.Sprint([]byte(s)), "[]"),
			strings.Trim(fmt.Sprintf("%#v", []byte(s)), "[]byte{}"), fmt.Sprintf("% x", s))
	}
	clean := func(t *testing.T, how, text string) {
		t.Helper()
		for _, needle := range needles {
			if strings.Contains(text, needle) {
				t.Errorf("%s tells a secret: %s", how, text)
				return
			}
		}
	}
	for name, holder := range holders {
		t.Run(name, func(t *testing.T) {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%T", "%p"} {
				clean(t, verb, fmt.Sprintf(verb, holder))
			}
			if data, err := json.Marshal(holder); err == nil {
				clean(t, "encoding/json", string(data))
			}
			var out bytes.Buffer
			for _, h := range []slog.Handler{slog.NewJSONHandler(&out, nil), slog.NewTextHandler(&out, nil)} {
				slog.New(h).With("a", holder).WithGroup("g").Info(fmt.Sprint(holder), "b", holder, slog.Group("h", "c", holder))
			}
			clean(t, "slog", out.String())
		})
	}
	if got := fmt.Sprintf("%v", creds); !strings.Contains(got, "ASIAID") {
		t.Errorf("%q does not say whose credentials these are", got)
	}
}

func collect(c *Cache) (all []Entry) {
	for e := range c.Snapshot() {
		all = append(all, e)
	}
	return all
}

// later is t by two clocks that have come apart: the monotonic one went on by mono, the wall clock by wall. The standard
// library has no way to say this, so it sets the monotonic reading in place.
func later(t *testing.T, from time.Time, mono, wall time.Duration) time.Time {
	t.Helper()
	at := from.Add(wall)
	ext := reflect.ValueOf(&at).Elem().FieldByName("ext")
	*(*int64)(unsafe.Pointer(ext.UnsafeAddr())) += int64(mono - wall)
	if at.Sub(from) != mono || at.Round(0).Sub(from.Round(0)) != wall {
		t.Fatalf("time.Time is not made of wall and ext any more: %s, %s", at.Sub(from), at.Round(0).Sub(from.Round(0)))
	}
	return at
}

func TestBothClocks(t *testing.T) {
	const hour, min = time.Hour, time.Minute
	for _, tt := range []struct {
		name          string
		skew          time.Duration // of STS's clock against the node's
		duration      time.Duration
		mono, wall    time.Duration // since the answer
		serve, refred bool
	}{
		{"fresh", 0, hour, 0, 0, true, false},
		{"before half life", 0, hour, 26 * min, 26 * min, true, false},
		{"after half life", 0, hour, 34 * min, 34 * min, true, true},
		{"before the last minute", 0, hour, 59*min - 1, 59*min - 1, true, true},
		{"last minute", 0, hour, 59 * min, 59 * min, false, true},
		{"suspended past half life", 0, hour, min, 40 * min, true, true},
		{"suspended into the last minute", 0, hour, min, 59 * min, false, true},
		{"suspended past the end", 0, hour, min, 2 * hour, false, true},
		{"wall clock set back", 0, hour, 40 * min, -hour, true, true},
		{"wall clock set back, at the end", 0, hour, 59 * min, -hour, false, true},
		{"clock behind", 2 * hour, hour, 58 * min, 58 * min, true, true},
		{"clock behind, at the end", 2 * hour, hour, 59 * min, 59 * min, false, true},
		{"clock ahead", -30 * min, hour, 10 * min, 10 * min, true, false},
		{"clock ahead, at the end", -30 * min, hour, 29 * min, 29 * min, false, true},
		{"clock far ahead, at the end", -59*min + 10*time.Second, hour, 10 * time.Second, 10 * time.Second, false, true},
		{"duration not known", 0, 0, 58 * min, 58 * min, true, true},
		{"duration not known, at the end", 0, 0, 59 * min, 59 * min, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			issued := time.Now()
			v, err := newValue(NewCredentials("ASIA", "s", "t", issued, issued.Add(hour+tt.skew).Round(0)), tt.duration, 0, issued, nil)
			if err != nil {
				t.Fatal(err)
			}
			now := later(t, issued, tt.mono, tt.wall)
			if got := v.servable(now); got != tt.serve {
				t.Errorf("served: %v, want %v", got, tt.serve)
			}
			if got := !(&entry{value: v}).dueAt(now).After(now); got != tt.refred {
				t.Errorf("to be refreshed: %v, want %v", got, tt.refred)
			}
		})
	}
}

// After a suspension no timer fires early, but Run sees within 30 s what time it is.
func TestWallClockJump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, map[Key]bool{key: true})
		r.mustGet(key, time.Second)
		synctest.Wait()
		r.mu.Lock()
		v := *r.Cache.entries[key].value // as it were two hours later by the wall clock
		v.serveUntilWall, v.refreshAtWall = v.serveUntilWall.Add(-2*time.Hour), v.refreshAtWall.Add(-2*time.Hour)
		r.Cache.entries[key].value = &v
		r.mu.Unlock()
		if r.Peek(&key, nil, time.Now()) != nil {
			t.Error("served although it has expired by the wall clock")
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if r.Peek(&key, nil, time.Now()) == nil {
			t.Error("not refreshed 30 s after the wall clock jumped")
		}
	})
}

func TestClockAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, nil)
		for _, skew := range []time.Duration{-2 * time.Hour, -time.Hour, -time.Hour + margin} {
			r.sts.skew = skew
			c, err := r.get(key, 450*time.Millisecond)
			if err == nil {
				t.Fatalf("served %v with %s left by the node's clock", c, time.Until(c.Expires))
			}
			if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "node's clock") {
				t.Errorf("error %q does not name the node's clock", err)
			}
			time.Sleep(2 * resync)
		}
		// The clock is set: the next try succeeds.
		r.sts.skew = -time.Hour + margin + time.Second
		r.mustGet(key, 450*time.Millisecond)
	})
}

func TestIssueError(t *testing.T) {
	cause := errors.New("AccessDenied: no")
	var err error = &IssueError{Code: "AccessDenied", Denied: true, Hint: "change the trust policy", Err: cause}
	if got, want := err.Error(), "AccessDenied: no; fix: change the trust policy"; got != want || !errors.Is(err, cause) {
		t.Errorf("error %q, want %q", got, want)
	}
	// A denial is told from a failure through any wrapping, and the last error survives its entry's unavailability.
	for _, e := range []*entry{{err: err}, {err: fmt.Errorf("issuing: %w", err)}} {
		if got := e.unavailable(); got != err {
			t.Errorf("unavailable() = %v, want the denial itself", got)
		}
	}
	down := &IssueError{Err: context.DeadlineExceeded}
	got := (&entry{err: down}).unavailable()
	if diff := cmp.Diff([]bool{true, true}, []bool{errors.Is(got, ErrUnavailable), errors.Is(got, context.DeadlineExceeded)}); diff != "" {
		t.Errorf("%v wraps ErrUnavailable and its cause (-want +got):\n%s", got, diff)
	}
}

// Clients keep credentials until the end that their document names: one that no session can have is not passed on.
func TestEndThatNoSessionHas(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct{ expires, want time.Time }{
		"as it is":                {now.Add(time.Hour), now.Add(time.Hour)},
		"by a clock 2 h ahead":    {now.Add(3 * time.Hour), now.Add(3 * time.Hour)},
		"in the year 9999":        {time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), now.Add(time.Hour)},
		"later than Go can count": {time.Unix(1<<62, 0), now.Add(time.Hour)},
	} {
		var document time.Time
		v, err := newValue(NewCredentials("ASIA", "s", "t", now, tt.expires), time.Hour, 0, now, func(c Credentials) []byte {
			document = c.Expires
			return []byte("{}")
		})
		if err != nil || !document.Equal(tt.want) || !v.creds.Expires.Equal(tt.want) {
			t.Errorf("%s: %v in the document, want %v, error %v", name, document, tt.want, err)
		}
	}
}
