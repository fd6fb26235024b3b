package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Client talks to the fabric. It is safe for concurrent use.
type Client struct{ http *http.Client }

// NewClient talks to the fabric at a unix socket.
func NewClient(socket string) *Client {
	return &Client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}}
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://fabric"+path+"?"+query.Encode(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the fabric: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("the fabric refuses %s %s: %s", method, path, strings.TrimSpace(string(text)))
	}
	if out == nil {
		out = new(json.RawMessage)
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

// SetRole adds an IAM role or replaces it.
func (c *Client) SetRole(ctx context.Context, r aws.Role) error {
	return c.do(ctx, http.MethodPost, "/aws/role", nil, r, nil)
}

// Role makes an IAM role, team/NAME for instance, that the node role and, by their tokens, all service accounts may assume,
// and returns its ARN.
func (c *Client) Role(ctx context.Context, name string, allow ...string) (string, error) {
	arn := "arn:aws:iam::" + Account + ":role/" + name
	return arn, c.SetRole(ctx, aws.Role{ARN: arn, Allow: allow, Trust: []aws.Trust{
		{AWS: NodeRoleARN, Actions: []string{aws.ActionAssumeRole, aws.ActionTagSession}},
		{Federated: Provider().ARN(), Subject: "system:serviceaccount:*", Audience: "sts.amazonaws.com"},
	}})
}

// Provider is what AWS knows of the cluster's service account tokens, without its keys.
func Provider() aws.Provider {
	return aws.Provider{Account: Account, Issuer: APIServer, ClientIDs: []string{"sts.amazonaws.com"}}
}

// Calls are those that AWS saw after the first n, oldest first.
func (c *Client) Calls(ctx context.Context, after int) (calls []aws.Call, err error) {
	err = c.do(ctx, http.MethodGet, "/aws/calls", url.Values{"after": {strconv.Itoa(after)}}, nil, &calls)
	return calls, err
}

// Owner says whose an access key is.
func (c *Client) Owner(ctx context.Context, accessKeyID string) (o Owner, err error) {
	err = c.do(ctx, http.MethodGet, "/aws/owner", url.Values{"key": {accessKeyID}}, nil, &o)
	return o, err
}

// Inject makes a fault strike calls from now on, until remove.
func (c *Client) Inject(ctx context.Context, f aws.Fault) (remove func(context.Context) error, err error) {
	var id int
	err = c.do(ctx, http.MethodPost, "/aws/fault", nil, f, &id)
	return func(ctx context.Context) error {
		return c.do(ctx, http.MethodDelete, "/aws/fault", url.Values{"id": {strconv.Itoa(id)}}, nil, nil)
	}, err
}

// SetSessionLength makes sessions issued from now on last d; 0 restores the rule.
func (c *Client) SetSessionLength(ctx context.Context, d time.Duration) error {
	return c.do(ctx, http.MethodPost, "/aws/session-length", nil, d, nil)
}

// KillAWS cuts every connection to AWS and refuses new ones until StartAWS.
func (c *Client) KillAWS(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/aws/kill", nil, nil, nil)
}

// StartAWS ends what KillAWS began.
func (c *Client) StartAWS(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/aws/start", nil, nil, nil)
}

// Requests are those that reached the real metadata endpoint after the first n.
func (c *Client) Requests(ctx context.Context, after int) (rs []imds.Request, err error) {
	err = c.do(ctx, http.MethodGet, "/imds/requests", url.Values{"after": {strconv.Itoa(after)}}, nil, &rs)
	return rs, err
}

// Packets are all that have arrived for the real metadata endpoint up to now.
func (c *Client) Packets(ctx context.Context) (ps []imds.Packets, err error) {
	err = c.do(ctx, http.MethodGet, "/imds/packets", nil, nil, &ps)
	return ps, err
}
