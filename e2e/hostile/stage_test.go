package hostile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// shared is the lab of this package.
var shared *lab.Lab

// TestMain runs the tests or, in a process of a pod's, what attack says.
func TestMain(m *testing.M) {
	if kind := os.Getenv(attackVariable); kind != "" {
		os.Exit(attackMain(kind))
	}
	os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l }))
}

const endpoint6 = "[fd00:ec2::254]:80"

// stage is a node with a daemon that holds no credentials of the node's, so that nothing but the table's paths may ever be
// asked of the real endpoint.
type stage struct {
	*lab.Node
	daemon          *lab.Daemon
	namespace       string
	mallory, victim *lab.Pod // each with a role of its own
	none            *lab.Pod // without a role
	roles           map[*lab.Pod]string
}

func newStage(t testing.TB, o lab.NodeOptions, flags ...string) *stage {
	t.Helper()
	s := &stage{Node: labtest.Node(t, shared, o), namespace: shared.Unique("shop"), roles: map[*lab.Pod]string{}}
	s.daemon = labtest.Daemon(t, s.Node, append([]string{"-issuer", "web-identity"}, flags...)...)
	s.mallory, s.victim, s.none = s.pod(t, "mallory", "team/mallory-role"), s.pod(t, "victim", "victim-role"), s.pod(t, "none", "")
	for _, p := range []*lab.Pod{s.mallory, s.victim} {
		if err := s.own(labtest.Context(t), p); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// pod adds a pod of the service account, with the role unless that is empty.
func (s *stage) pod(t testing.TB, account, role string) *lab.Pod {
	t.Helper()
	annotations := map[string]string{}
	if role != "" {
		arn, err := s.Role(role, aws.ActionListBuckets)
		if err != nil {
			t.Fatal(err)
		}
		annotations["eks.amazonaws.com/role-arn"] = arn
		role = arn
	}
	if err := shared.ServiceAccount(labtest.Context(t), s.namespace, account, annotations); err != nil {
		t.Fatal(err)
	}
	p := labtest.Pod(t, s.Node, lab.PodSpec{Namespace: s.namespace, ServiceAccount: account})
	s.roles[p] = role
	return p
}

// errOther is never asked again until it is gone.
var errOther = errors.New("the credentials of somebody else")

// own says whether the pod gets its own credentials, asking as SDKs do, for up to 10 s.
func (s *stage) own(ctx context.Context, p *lab.Pod) (err error) {
	for end := time.Now().Add(10 * time.Second); ; {
		if err = s.ownNow(ctx, p); err == nil || errors.Is(err, errOther) || time.Now().After(end) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond): // a 503 says: ask again
		case <-ctx.Done():
		}
	}
}

func (s *stage) ownNow(ctx context.Context, p *lab.Pod) error {
	token, err := ask(ctx, p, http.MethodPut, "/latest/api/token", http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"21600"}})
	if err != nil {
		return err
	}
	header := http.Header{"X-Aws-Ec2-Metadata-Token": {token}}
	role, err := ask(ctx, p, http.MethodGet, list+"/", header)
	if err != nil {
		return err
	}
	body, err := ask(ctx, p, http.MethodGet, list+"/"+role, header)
	if err != nil {
		return err
	}
	var doc struct{ AccessKeyId string } //nolint:revive // name of the format
	if err := json.Unmarshal([]byte(body), &doc); err != nil {
		return err
	}
	if owner, ok := s.AWS.Owner(doc.AccessKeyId); !ok || owner.RoleARN != s.roles[p] {
		return fmt.Errorf("pod %s got %w: of %+v, not %s", p.Name, errOther, owner, s.roles[p])
	}
	return nil
}

// ask returns the body of a 200.
func ask(ctx context.Context, p *lab.Pod, method, path string, header http.Header) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+endpoint+path, nil)
	if err != nil {
		return "", err
	}
	if header != nil {
		req.Header = header
	}
	resp, err := p.HTTP().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s in %s: %d: %s", method, path, p.Name, resp.StatusCode, body)
	}
	return string(body), err
}

func token(t testing.TB, p *lab.Pod) string {
	t.Helper()
	body, err := ask(labtest.Context(t), p, http.MethodPut, "/latest/api/token", http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"21600"}})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

var nodes = ofNode(lab.NodeRole)

// stolen says what an answer to the pod holds that is not the pod's.
func (s *stage) stolen(p *lab.Pod, answer string) error {
	if m := nodes.FindString(answer); m != "" {
		return fmt.Errorf("the node's %q", m)
	}
	for _, key := range accessKeys.FindAllString(answer, -1) {
		owner, ok := s.AWS.Owner(key)
		if !ok || owner.Node || owner.RoleARN != s.roles[p] {
			return fmt.Errorf("the credentials of %+v, known %v", owner, ok)
		}
	}
	return nil
}

// untouched fails the test unless no packet of a pod has come to the real endpoint, and no request but what the table builds.
func (s *stage) untouched(t testing.TB) {
	t.Helper()
	labtest.Untouched(t, s.Node, imds.Expected{})
}

// speak is Speak over one connection of the pod's.
func speak(ctx context.Context, p *lab.Pod, to, raw string) (string, error) {
	c, err := p.Dial(ctx, "tcp", to)
	if err != nil {
		return "", err
	}
	return Speak(c, raw)
}

// eventually waits for what only asking tells.
func eventually(t testing.TB, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-time.After(25 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
}

// at is an address and port of the node's.
func at(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }
