package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

const (
	endpoint  = "http://169.254.169.254"
	endpoint6 = "http://[fd00:ec2::254]"
	tokenPath = "/latest/api/token"
	roleList  = "/latest/meta-data/iam/security-credentials/"
)

// expectedOfNodeRole is what the node may ask of its real endpoint with assume-role.
var expectedOfNodeRole = imds.Expected{NodeRole: true}

// ask sends one request from inside a pod.
func ask(ctx context.Context, p *lab.Pod, method, url string, header map[string]string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return 0, "", err
	}
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := p.HTTP().Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// get asks for a path as IMDSv1 does.
func get(t *testing.T, p *lab.Pod, path string) (status int, body string) {
	t.Helper()
	status, body, err := ask(labtest.Context(t), p, http.MethodGet, endpoint+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return status, body
}

// wantStatus asks for a path and complains about any other status.
func wantStatus(p *lab.Pod, path string, want int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	status, body, err := ask(ctx, p, http.MethodGet, endpoint+path, nil)
	if err == nil && status != want {
		err = fmt.Errorf("GET %s in %s/%s: %d, want %d: %s", path, p.Namespace, p.Name, status, want, body)
	}
	return err
}

// token asks for a session token.
func token(t *testing.T, p *lab.Pod) string {
	t.Helper()
	status, body, err := ask(labtest.Context(t), p, http.MethodPut, endpoint+tokenPath, map[string]string{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "21600"})
	if err != nil || status != 200 {
		t.Fatalf("PUT %s: %d %v: %s", tokenPath, status, err, body)
	}
	return body
}

// document is what clients read of the credential document.
type document struct {
	Code, AccessKeyId, SecretAccessKey, Token string //nolint:revive // names of the format
	Expiration                                time.Time
}

// errNotYet is a 503, which asks to come again.
var errNotYet = errors.New("not yet")

// credentials fetches the role list and the document as SDKs do, with a session token.
func credentials(ctx context.Context, p *lab.Pod) (role string, d document, err error) {
	step := func(method, path string, header map[string]string) (string, error) {
		status, body, err := ask(ctx, p, method, endpoint+path, header)
		if err == nil && status != 200 {
			err = fmt.Errorf("%s %s in %s/%s: %d: %s", method, path, p.Namespace, p.Name, status, body)
			if status == http.StatusServiceUnavailable {
				err = fmt.Errorf("%w: %w", errNotYet, err)
			}
		}
		return body, err
	}
	token, err := step(http.MethodPut, tokenPath, map[string]string{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "21600"})
	if err != nil {
		return "", d, err
	}
	header := map[string]string{"X-Aws-Ec2-Metadata-Token": token}
	if role, err = step(http.MethodGet, roleList, header); err != nil {
		return "", d, err
	}
	body, err := step(http.MethodGet, roleList+role, header)
	if err == nil {
		err = json.Unmarshal([]byte(body), &d)
	}
	if err == nil && (d.Code != "Success" || d.AccessKeyId == "" || d.SecretAccessKey == "" || d.Token == "") {
		err = fmt.Errorf("the document is not whole: %s", d.Code)
	}
	return role, d, err
}

// served asks for a pod's first credentials, and again after a 503: the daemon may not have heard of the pod, or STS not have
// answered, within the hold. Any other refusal ends an SDK's search, and must not come first; nor may another role's credentials.
func served(t *testing.T, n *lab.Node, p *lab.Pod, role string) (d document) {
	t.Helper()
	labtest.Eventually(t, func() (err error) {
		if _, d, err = credentials(labtest.Context(t), p); err != nil && !errors.Is(err, errNotYet) {
			t.Fatal(err)
		}
		return err
	})
	if err := owned(n, d, role); err != nil {
		t.Fatal(err)
	}
	return d
}

// soon fails unless one of five tries takes no longer than the limit: what else the machine does disturbs some of them, what the
// product waits for all of them.
func soon(t *testing.T, what string, limit time.Duration, try func()) {
	t.Helper()
	var fastest time.Duration
	for i := range 5 {
		start := time.Now()
		try()
		if took := time.Since(start); i == 0 || took < fastest {
			fastest = took
		}
		if fastest <= limit {
			return
		}
	}
	t.Errorf("%s takes %v, want at most %v", what, fastest, limit)
}

// owned checks that the credentials are the role's by asking AWS who owns the access key.
func owned(n *lab.Node, d document, role string) error {
	owner, ok := n.AWS.Owner(d.AccessKeyId)
	if !ok || owner.RoleARN != role || owner.Node {
		return fmt.Errorf("the credentials are those of %+v, want %s", owner, role)
	}
	return nil
}

// getResponse is get for those who want the headers.
func getResponse(ctx context.Context, p *lab.Pod, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := p.HTTP().Do(req)
	if err == nil {
		resp.Body.Close()
	}
	return resp, err
}
