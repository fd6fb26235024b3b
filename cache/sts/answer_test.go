package sts

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/imdsgate/imdsgate/cache"
)

// What STS says about whose session it is must be true, where it says it.
func TestAnswerOfAnotherSession(t *testing.T) {
	const ours = "arn:aws:sts::123456789012:assumed-role/cart/shop.cart@node-1"
	for arn, ok := range map[string]bool{
		ours: true,
		"arn:aws:sts::123456789012:assumed-role/Cart/shop.cart@node-1": true, // names of roles differ in more than case
		"": true, "arn:minio:sts:::": true, "x": true,
		"arn:aws:sts::123456789012:assumed-role/victim/shop.cart@node-1":    false,
		"arn:aws:sts::123456789012:assumed-role/cart/shop.victim@node-1":    false,
		"arn:aws:sts::210987654321:assumed-role/cart/shop.cart@node-1":      false,
		"arn:aws:sts::123456789012:assumed-role/cart":                       false,
		"arn:aws:sts::123456789012:assumed-role/team/cart/shop.cart@node-1": false,
	} {
		for _, web := range []bool{false, true} {
			key, op := key, opAssumeRole
			if web {
				key, op = webKey, opWebIdentity
			}
			s, _ := start(t, Options{WebIdentity: web}, func(int, call) answer {
				return answer{body: "<" + op + "Response><" + op + "Result><AssumedRoleUser><AssumedRoleId>x</AssumedRoleId><Arn>" + arn + "</Arn></AssumedRoleUser>" +
					"<Credentials><AccessKeyId>a</AccessKeyId><SecretAccessKey>b</SecretAccessKey><SessionToken>c</SessionToken>" +
					"<Expiration>2031-01-02T15:04:05Z</Expiration></Credentials></" + op + "Result></" + op + "Response>"}
			})
			c, err := s.Issue(t.Context(), key)
			switch {
			case ok && (err != nil || c.AccessKeyID != "a"):
				t.Errorf("%s of %q: %v %v", op, arn, c, err)
			case !ok && (c.AccessKeyID != "" || !strings.Contains(issueError(t, err).Error(), "another session's credentials, those of "+arn)):
				t.Errorf("%s of %q: %v %v", op, arn, c, err)
			case !ok && issueError(t, err).Denied:
				t.Errorf("%s of %q is final", op, arn)
			}
		}
	}
}

// Servers with STS's interface may know no accounts, and answer with one all the same, or without.
func TestSessionWithoutAccount(t *testing.T) {
	key := cache.Key{RoleARN: "arn:aws:iam:::role/cart", SessionName: "s"}
	for arn, want := range map[string]bool{
		"arn:aws:sts:::assumed-role/cart/s": true, "arn:aws:sts::000000000000:assumed-role/cart/s": true,
		"arn:aws:sts:::assumed-role/victim/s": false, "arn:aws:sts:::assumed-role/cart/other": false,
	} {
		if got := sessionOf(key, arn); got != want {
			t.Errorf("%s: %v", arn, got)
		}
	}
	key.RoleARN = "arn:aws:iam::123456789012:role/cart"
	if sessionOf(key, "arn:aws:sts:::assumed-role/cart/s") {
		t.Error("an account was asked for, and none answered")
	}
}

// Whatever answers in STS's place cannot fill the memory, with a success or with an error.
func TestEndlessAnswer(t *testing.T) {
	for _, status := range []int{http.StatusOK, http.StatusForbidden, http.StatusInternalServerError} {
		var sent atomic.Int64
		endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			for junk := bytes.Repeat([]byte("<a>"), 1<<10); ; {
				n, err := w.Write(junk)
				if err != nil {
					return
				}
				sent.Add(int64(n))
			}
		}))
		environment(t, endless.URL)
		s, err := New(t.Context(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Issue(t.Context(), key)
		if e := issueError(t, err); e.Denied || !strings.Contains(e.Error(), "something that is not STS answered") {
			t.Errorf("status %d: %v", status, e)
		}
		endless.Close()
		if n := sent.Load(); n > 64<<20 { // the kernel's buffers take some
			t.Errorf("status %d: %d bytes were sent", status, n)
		}
	}
}
