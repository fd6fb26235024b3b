package sts

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/cache"
)

// finishing is a log that says when the first issue has ended.
type finishing struct {
	bytes.Buffer
	once  sync.Once
	ended chan struct{}
}

func (f *finishing) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(`"namespace":"shop"`)) {
		f.once.Do(func() { close(f.ended) })
	}
	return f.Buffer.Write(p)
}

// audit has a cache over a real STS client issue once for the key, and returns what was logged, at every level.
func audit(t *testing.T, o Options, k cache.Key, answers func(int, call) answer) (lines []map[string]any, text string, srv *server) {
	t.Helper()
	log := &finishing{ended: make(chan struct{})}
	o.Log = slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, srv := start(t, o, answers)
	c := cache.New(cache.Options{
		Issuer: s, Log: o.Log, Dir: filepath.Join(t.TempDir(), "kept"),
		Live:   func() iter.Seq2[cache.Key, bool] { return maps.All(map[cache.Key]bool{k: true}) },
		Encode: func(c cache.Credentials) []byte { return []byte(c.SecretAccessKey() + c.SessionToken()) },
	})
	if err := c.Restore(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { _ = c.Run(ctx) })
	select {
	case <-log.ended:
	case <-time.After(20 * time.Second):
		t.Error("no end of the issue is logged")
	}
	cancel()
	run.Wait() // nobody writes to the log any more
	for line := range strings.Lines(log.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, m)
	}
	return lines, log.String(), srv
}

// Each issued session leaves one line with what CloudTrail has of it, as STS saw and said it, and whose it is in the cluster.
func TestAuditLine(t *testing.T) {
	for name, tt := range map[string]struct {
		o       Options
		key     cache.Key
		nth     string // of the calls is the pod's
		further []string
	}{
		"assume-role":  {Options{}, key, "1", nil},
		"web-identity": {Options{WebIdentity: true}, webKey, "1", nil},
		"intermediate": {Options{IntermediateRoleARN: hopARN, NodeSessionName: "imdsgate@node-1"}, key, "2", []string{"1"}},
	} {
		t.Run(name, func(t *testing.T) {
			lines, text, srv := audit(t, tt.o, tt.key, nil)
			lines = slices.DeleteFunc(lines, func(m map[string]any) bool { return !strings.HasSuffix(m["msg"].(string), "session issued") })
			if n := len(srv.seen()); n != len(lines) {
				t.Fatalf("%d sessions, %d lines:\n%s", n, len(lines), text)
			}
			for i, c := range srv.seen() {
				want := map[string]any{
					"level": "INFO", "msg": "session issued", "namespace": "shop", "service_account": "cart", "role_arn": c.form.Get("RoleArn"),
					"session_name": c.form.Get("RoleSessionName"), "access_key_id": "ASIA" + tt.nth, "sts_request_id": "request-" + tt.nth,
				}
				if i < len(tt.further) {
					want["msg"], want["access_key_id"], want["sts_request_id"] = "intermediate session issued", "ASIA"+tt.further[i], "request-"+tt.further[i]
					delete(want, "namespace")
					delete(want, "service_account")
				}
				expires, err := time.Parse(time.RFC3339, lines[i]["expires"].(string))
				if left := time.Until(expires); err != nil || left < 59*time.Minute || left > time.Hour || expires.Location() != time.UTC {
					t.Errorf("expires %v: %v", lines[i]["expires"], err)
				}
				delete(lines[i], "expires")
				delete(lines[i], "time")
				if diff := cmp.Diff(want, lines[i]); diff != "" {
					t.Errorf("line (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// Nothing that is written, whatever STS answers and at any level, holds a secret, a session token or a web identity token.
func TestAuditHoldsNoSecret(t *testing.T) {
	echo := func(_ int, c call) answer { // the rudest of servers
		return answer{status: 403, code: "AccessDenied", message: strings.Join([]string{c.form.Get("WebIdentityToken"), c.form.Get("ExternalId"), c.authorization, c.sessionToken}, " ")}
	}
	for name, tt := range map[string]struct {
		o       Options
		key     cache.Key
		answers func(int, call) answer
		want    string // in the log: else nothing was looked at
	}{
		"assume-role":         {Options{}, key, nil, `"session issued"`},
		"intermediate":        {Options{IntermediateRoleARN: hopARN}, key, nil, `"intermediate session issued"`},
		"web-identity":        {Options{WebIdentity: true}, webKey, nil, `"session issued"`},
		"assume-role, echo":   {Options{}, key, echo, "AccessDenied"},
		"web-identity, echo":  {Options{WebIdentity: true}, webKey, echo, "AccessDenied"},
		"assume-role, half":   {Options{}, key, half, "without complete credentials"},
		"intermediate, half":  {Options{IntermediateRoleARN: hopARN}, key, half, "without complete credentials"},
		"web-identity, page":  {Options{WebIdentity: true}, webKey, page, "not STS"},
		"assume-role, capped": {Options{}, withDuration(key, 2*time.Hour), capped, "last 1h"},
	} {
		t.Run(name, func(t *testing.T) {
			_, text, _ := audit(t, tt.o, tt.key, tt.answers)
			if !strings.Contains(text, tt.want) {
				t.Errorf("no %s in:\n%s", tt.want, text)
			}
			for _, secret := range []string{nodeSecret, issuedSecret, issuedSession, webToken} {
				if strings.Contains(text, secret) {
					t.Errorf("%s is logged:\n%s", secret, text)
				}
			}
		})
	}
}

// half answers 200 with credentials that lack their end.
func half(_ int, c call) answer {
	return answer{body: `<` + c.form.Get("Action") + `Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><` + c.form.Get("Action") +
		`Result><Credentials><AccessKeyId>ASIA1</AccessKeyId><SecretAccessKey>` + issuedSecret + `</SecretAccessKey><SessionToken>` + issuedSession +
		`</SessionToken></Credentials></` + c.form.Get("Action") + `Result></` + c.form.Get("Action") + `Response>`}
}

// page answers as a proxy that echoes would.
func page(_ int, c call) answer {
	return answer{status: 502, body: "<html>" + c.form.Encode() + c.form.Get("WebIdentityToken") + "</html>"}
}

func capped(n int, _ call) answer {
	if n == 1 {
		return answer{status: 400, code: "ValidationError", message: "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."}
	}
	return answer{}
}

func withDuration(k cache.Key, d time.Duration) cache.Key {
	k.Duration = d
	return k
}
