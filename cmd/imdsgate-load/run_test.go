package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/imdsgate-load/load"
)

const secret = "wJalrXUtnFEMI-not-to-be-seen"

// endpoint is a metadata endpoint on the loopback. refuse may answer in its place; n counts requests from 1.
func endpoint(t *testing.T, refuse func(w http.ResponseWriter, r *http.Request, n int64) bool) string {
	t.Helper()
	var n atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refuse != nil && refuse(w, r, n.Add(1)) {
			return
		}
		switch {
		case r.Host != "169.254.169.254":
			http.Error(w, "unexpected Host "+r.Host, http.StatusForbidden)
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
			io.WriteString(w, "a-token")
		case r.URL.Path == list:
			io.WriteString(w, "cart")
		case r.URL.Path == list+"cart":
			fmt.Fprintf(w, `{"Code":"Success","AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":%q,"Token":%q,"Expiration":%q}`,
				secret, secret, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func invoke(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var o, e bytes.Buffer
	code = exitCode(run(t.Context(), args, &o), &e)
	if all := o.String() + e.String(); strings.Contains(all, secret) || strings.Contains(all, "ASIAEXAMPLE") {
		t.Errorf("%q prints credentials:\n%s", args, all)
	}
	return code, o.String(), e.String()
}

// quick is a load that is over at once.
func quick(address string, more ...string) []string {
	return append([]string{"-endpoint", address, "-rate", "500", "-n", "50", "-warmup", "0"}, more...)
}

func TestLoad(t *testing.T) {
	address := endpoint(t, nil)
	picture := filepath.Join(t.TempDir(), "latency.svg")
	for _, more := range [][]string{nil, {"-imds", "1"}, {"-sequence", "document", "-reuse", "keep"}, {"-reuse", "request"}, {"-svg", picture}} {
		code, stdout, stderr := invoke(t, quick(address, more...)...)
		if code != 0 || stderr != "" {
			t.Fatalf("%q: exit code %d: %s", more, code, stderr)
		}
		for _, want := range []string{"role cart, credentials valid for ", "50 operations in ", " 0 failed", "answered within", "90 %"} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%q: no %q in\n%s", more, want, stdout)
			}
		}
	}
	b, err := os.ReadFile(picture)
	if err != nil || !bytes.Contains(b, []byte("<polyline")) || xml.Unmarshal(b, new(any)) != nil || bytes.Contains(b, []byte("NaN")) {
		t.Errorf("the drawing is none: %v\n%.300s", err, b)
	}

	code, stdout, stderr := invoke(t, quick(address, "-json")...)
	var r load.JSON
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || code != 0 || stderr != "" {
		t.Fatalf("-json: exit code %d, %v: %s%s", code, err, stdout, stderr)
	}
	if r.Operations != 50 || r.Failed != 0 || r.Latency.P50 <= 0 || len(r.Curve) == 0 {
		t.Errorf("%+v", r)
	}
}

// What is wrong is told once, in imdsgate's own words.
func TestRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		path   string
		status int
		body   string
		args   []string
		want   []string
	}{
		"no role":       {list, 404, "service account shop/cart has no eks.amazonaws.com/role-arn annotation", nil, []string{"has no role", "404", "shop/cart has no eks"}},
		"denied":        {list, 403, "namespace shop does not permit it\x1b[2J", nil, []string{"refused its role", "403", "namespace shop does not permit it [2J"}},
		"not yet":       {list, 503, "not known yet", nil, []string{"try again", "503", "not known yet"}},
		"document":      {list + "cart", 404, "no such role", nil, []string{"/cart: 404"}},
		"needs a token": {list, 401, "", []string{"-imds", "1"}, []string{"-imds 2"}},
		"no document":   {list + "cart", 200, `{"Code":"Success","SecretAccessKey":"` + secret, nil, []string{"is no credential document"}},
		"redirect":      {list, 301, "", nil, []string{"not expected", "301"}},
	} {
		t.Run(name, func(t *testing.T) {
			address := endpoint(t, func(w http.ResponseWriter, r *http.Request, _ int64) bool {
				if r.URL.Path == tt.path {
					w.WriteHeader(tt.status)
					io.WriteString(w, tt.body)
				}
				return r.URL.Path == tt.path
			})
			code, stdout, stderr := invoke(t, quick(address, tt.args...)...)
			if code != 1 || stdout != "" {
				t.Errorf("exit code %d, stdout %q", code, stdout)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("no %q in %q", want, stderr)
				}
			}
		})
	}
	if code, _, stderr := invoke(t, "-endpoint", "127.0.0.1:1"); code != 1 || !strings.Contains(stderr, "nobody answers") {
		t.Errorf("nobody there: %d %s", code, stderr)
	}
}

func TestOperationsFail(t *testing.T) {
	address := endpoint(t, func(w http.ResponseWriter, r *http.Request, n int64) bool {
		if n > 3 && r.URL.Path == list {
			http.Error(w, "STS is down", http.StatusServiceUnavailable)
			return true
		}
		return false
	})
	code, stdout, _ := invoke(t, quick(address)...)
	if code != 1 || !strings.Contains(stdout, "50 failed") || !strings.Contains(stdout, "50 × status 503") {
		t.Errorf("exit code %d:\n%s", code, stdout)
	}
	// A pod without a role is measured too.
	address = endpoint(t, func(w http.ResponseWriter, r *http.Request, _ int64) bool {
		if r.URL.Path == list {
			http.NotFound(w, r)
		}
		return r.URL.Path == list
	})
	if code, stdout, stderr := invoke(t, quick(address, "-want", "404")...); code != 0 || !strings.Contains(stdout, " 0 failed") {
		t.Errorf("-want 404: exit code %d: %s%s", code, stdout, stderr)
	}
}

func TestUsage(t *testing.T) {
	address := endpoint(t, func(http.ResponseWriter, *http.Request, int64) bool { t.Error("it asked"); return false })
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-endpoint", "metadata"}, "want IP:PORT"},
		{[]string{"-rate", "501"}, "-force"},
		{[]string{"-connections", "65"}, "-force"},
		{[]string{"-duration", "11m"}, "-force"},
		{[]string{"-n", "1000000"}, "-force"},
		{[]string{"-rate", "0"}, "rate 0"},
		{[]string{"-rate", "NaN"}, "rate NaN"},
		{[]string{"-n", "-1"}, "positive"},
		{[]string{"-n", "5", "-rate", "0"}, "positive"},
		{[]string{"-sequence", "all"}, `"all"`},
		{[]string{"-force", "-rate", "1e9"}, "at most"},
		{[]string{"now"}, `"now"`},
		{[]string{"-nonsense"}, "-nonsense"},
	} {
		code, stdout, stderr := invoke(t, append([]string{"-endpoint", address}, tt.args...)...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("%q: exit code %d, want 2; no %q in %q%q", tt.args, code, tt.want, stdout, stderr)
		}
	}
	if code, stdout, stderr := invoke(t, "-help"); code != 0 || stderr != "" || !strings.Contains(stdout, "Exit codes") || !strings.Contains(stdout, "-svg") {
		t.Errorf("-help: %d %q %q", code, stdout, stderr)
	}
	if exitCode(errors.New("x"), io.Discard) != 1 {
		t.Error("exit code of a failure")
	}
}
