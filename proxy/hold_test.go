package proxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/cache"
)

// A pod whose IP becomes known 300 ms after its first request is answered on that request, once.
func TestHold(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.warm(t, "role")
	ip := netip.MustParseAddr("127.0.0.50")
	onTime(t, "a held request", func() bool {
		l.callers.set(ip, nil, nil)
		c := dial(t, l.addr, ip)
		start := time.Now()
		time.AfterFunc(300*time.Millisecond, func() { l.callers.set(ip, caller("new", grant("team/my-role"), nil), nil) })
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n", roleList)
		br := newReader(c)
		r, err := readReply(br, "GET")
		if err != nil {
			t.Fatal(err)
		}
		elapsed := time.Since(start)
		if elapsed < 300*time.Millisecond {
			t.Errorf("answered after %v", elapsed)
		}
		if elapsed > 450*time.Millisecond && r.StatusCode == 503 || elapsed > 450*time.Millisecond+slack {
			return true
		}
		if r.StatusCode != 200 || r.body != "my-role" {
			t.Errorf("%d %s", r.StatusCode, r.body)
		}
		checkThen(t, c, br, "closed") // exactly one answer
		return false
	})
}

// Identifying and STS share one deadline: a request that waits 300 ms for its pod waits 150 ms for STS, not 450.
func TestHoldEnds(t *testing.T) {
	t.Parallel()
	var cases sync.WaitGroup
	for name, prepare := range map[string]func(*lab, netip.Addr){
		"IP never known": func(*lab, netip.Addr) {},
		"STS never answers": func(l *lab, ip netip.Addr) {
			l.callers.set(ip, caller("new", grant("slow"), nil), nil)
		},
		"both late": func(l *lab, ip netip.Addr) {
			time.AfterFunc(300*time.Millisecond, func() { l.callers.set(ip, caller("new", grant("slow"), nil), nil) })
		},
	} {
		for _, path := range []string{roleList + "/", roleList + "/slow"} {
			held := func() (late bool) {
				l := newLab(t)
				l.issuer.delay = 5 * time.Second
				ip := netip.MustParseAddr("127.0.0.50")
				c := dial(t, l.addr, ip)
				start := time.Now()
				prepare(l, ip)
				fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", path)
				r, err := readReply(newReader(c), "GET")
				if err != nil {
					t.Errorf("%s, %s: %v", name, path, err)
					return false
				}
				if r.StatusCode != 503 || r.Header.Get("Retry-After") != "1" || !strings.Contains(r.body, " ") {
					t.Errorf("%s, %s: %d %v %s", name, path, r.StatusCode, r.Header, r.body)
				}
				return time.Since(start) > 500*time.Millisecond+slack
			}
			cases.Go(func() { onTime(t, name+", "+path, held) })
		}
	}
	cases.Wait()
}

func TestFirstRequestsIssueOnce(t *testing.T) {
	onTime(t, "a hundred first requests", func() (late bool) {
		l := newLab(t)
		l.issuer.delay = 100 * time.Millisecond
		l.callers.set(podIPs["role"], caller("role", grant("fresh"), nil), nil)
		var refused atomic.Int64
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				r := l.get(t, "role", roleList+"/fresh")
				switch {
				case r.StatusCode == 503 && r.elapsed > 450*time.Millisecond:
					refused.Add(1)
				case r.StatusCode != 200:
					t.Errorf("%d %s", r.StatusCode, r.body)
				}
			})
		}
		wg.Wait()
		if n := l.issuer.count(testRoleARN + "fresh"); n != 1 {
			t.Errorf("%d STS calls", n)
		}
		return refused.Load() > 0
	})
}

// Whatever the reason, the list fails when the document would.
func TestListFailsFirst(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	var pods sync.WaitGroup
	for pod := range podIPs {
		pods.Go(func() {
			role := "x"
			if c, _ := l.callers.Find(podIPs[pod]); c != nil && c.Grant != nil {
				role = c.Grant.Role
			}
			list := l.get(t, pod, roleList+"/")
			document := l.get(t, pod, roleList+"/"+role)
			if list.StatusCode != document.StatusCode {
				t.Errorf("%s: list %d, document %d", pod, list.StatusCode, document.StatusCode)
			}
			if ok := list.StatusCode == http.StatusOK; ok != (list.body == role) || ok != strings.Contains(document.body, "SecretAccessKey") {
				t.Errorf("%s: list %q, document %q", pod, list.body, document.body)
			}
		})
	}
	pods.Wait()
}

// STS fails once, then works: the error is not remembered for long, and what is cached is not overwritten.
func TestSTSRecovers(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	var once sync.Once
	l.issuer.fail = func(cache.Key) (err error) {
		once.Do(func() { err = &cache.IssueError{Err: errors.New("STS does not answer")} })
		return err
	}
	if r := l.get(t, "role", roleList+"/"); r.StatusCode != 503 {
		t.Fatalf("%d %s", r.StatusCode, r.body)
	}
	deadline := time.Now().Add(3 * time.Second)
	for {
		r := l.get(t, "role", roleList+"/")
		if r.StatusCode == 200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %d %s", r.StatusCode, r.body)
		}
	}
}

// The pod is looked up for every request, also on one connection.
func TestIdentityIsThePeer(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.warm(t, "role", "other")
	c := dial(t, l.addr, podIPs["role"])
	br := newReader(c)
	ask := func() *reply {
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\nX-Forwarded-For: 127.0.0.3\r\nX-Real-IP: 127.0.0.3\r\n\r\n", roleList)
		r, err := readReply(br, "GET")
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := ask(); r.body != "my-role" {
		t.Errorf("%d %q", r.StatusCode, r.body)
	}
	l.callers.set(podIPs["role"], nil, nil) // deleted
	if r := ask(); r.StatusCode != 503 {
		t.Errorf("deleted: %d %q", r.StatusCode, r.body)
	}
	l.callers.set(podIPs["role"], caller("next", grant("other-role"), nil), nil)
	if r := ask(); r.body != "other-role" {
		t.Errorf("next holder: %d %q", r.StatusCode, r.body)
	}
}

func TestEvents(t *testing.T) {
	l := newLab(t)
	for _, pod := range []string{"denied", "invalid", "sts-denied", "sts-down", "no-role", "role"} {
		l.get(t, pod, roleList+"/")
	}
	for _, want := range []string{
		"shop/denied sa=false RoleDenied: namespace shop does not permit the role",
		"shop/invalid sa=true InvalidRoleARN: not a role ARN",
		"shop/sts-denied sa=false CredentialsFailed: STS refused AssumeRole (AccessDenied); fix: let the trust policy of " + testRoleARN + "refused-by-sts name the node's role",
	} {
		if !l.reports.have(want) {
			t.Errorf("no Event %q in %q", want, l.reports.list)
		}
	}
	if len(l.reports.list) != 3 {
		t.Errorf("%q", l.reports.list)
	}
}

// Each session of each pod leaves one line when it is first given, by which an access key of CloudTrail leads to the pods that
// had it; and a list gives nothing.
func TestAuditNamesThePod(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.callers.set(podIPs["other"], caller("other", grant("team/my-role"), nil), nil) // two pods, one session
	l.warm(t, "role")
	l.get(t, "role", roleList+"/")
	if s := l.logged.String(); strings.Contains(s, "handed out") {
		t.Errorf("nothing was handed out yet: %s", s)
	}
	ask := func(pod string) { l.get(t, pod, roleList+"/my-role") }
	for range 3 {
		ask("role")
		ask("other")
	}
	l.callers.set(podIPs["role"], caller("role", grant("other-role"), nil), nil) // a decision changes
	l.get(t, "role", roleList+"/other-role")

	type line struct {
		Msg, Namespace, Pod string
		PodUID              string `json:"pod_uid"`
		ServiceAccount      string `json:"service_account"`
		SourceIP            string `json:"source_ip"`
		RoleARN             string `json:"role_arn"`
		SessionName         string `json:"session_name"`
		AccessKeyID         string `json:"access_key_id"`
		Expires             time.Time
	}
	var got []line
	for text := range strings.Lines(l.logged.String()) {
		var one line
		if err := json.Unmarshal([]byte(text), &one); err != nil {
			t.Fatal(err)
		}
		if one.Msg != "session handed out" {
			continue
		}
		if left := time.Until(one.Expires); left < 59*time.Minute || left > time.Hour {
			t.Errorf("expires in %v", left)
		}
		one.Expires = time.Time{}
		got = append(got, one)
	}
	of := func(pod, role, key string) line {
		return line{
			Msg: "session handed out", Namespace: "shop", Pod: pod, PodUID: pod, ServiceAccount: pod + "-sa", SourceIP: podIPs[pod].String(),
			RoleARN: testRoleARN + role, SessionName: grant(role).Key.SessionName, AccessKeyID: key,
		}
	}
	if diff := cmp.Diff([]line{
		of("role", "team/my-role", "ASIA-my-role-1"), of("other", "team/my-role", "ASIA-my-role-1"), of("role", "other-role", "ASIA-other-role-1"),
	}, got); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
	if strings.Contains(l.logged.String(), "SECRET") || strings.Contains(l.logged.String(), "TOKEN") {
		t.Errorf("a secret is logged: %s", l.logged)
	}
}

func TestLog(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.warm(t, "role")
	l.get(t, "role", roleList+"/my-role") // which hands out the session
	before := l.logged.String()
	l.get(t, "role", roleList+"/my-role")
	l.get(t, "role", roleList+"/")
	if s := l.logged.String(); s != before {
		t.Errorf("a hit is logged: %s", strings.TrimPrefix(s, before))
	}
	l.get(t, "sts-denied", roleList+"/")
	l.get(t, "special", roleList+"/")
	l.get(t, "unknown", roleList+"/")
	for _, want := range []string{
		`"namespace":"shop","pod":"sts-denied","service_account":"sts-denied-sa","role_arn":"` + testRoleARN + `refused-by-sts","result":"credentials_failed","status":403,"duration":`,
		`"result":"wait","status":200,`,
		`"source_ip":"127.0.0.11","result":"unknown_ip","status":503,`,
	} {
		if !strings.Contains(l.logged.String(), want) {
			t.Errorf("no %s in %s", want, l.logged)
		}
	}
	c := dial(t, l.addr, podIPs["no-role"])
	br := newReader(c)
	for range 1000 {
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
		if _, err := readReply(br, "GET"); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(l.logged.String(), `"result":"no_role"`); n < 1 || n > 20 {
		t.Errorf("1000 requests of one pod made %d log lines", n)
	}
	if strings.Contains(l.logged.String(), "SECRET") {
		t.Errorf("a secret is logged: %s", l.logged)
	}
}
