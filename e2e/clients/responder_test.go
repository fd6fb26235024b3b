package clients

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strconv"
	"strings"
	"time"
)

// answer is what the scripted endpoint says to one request.
type answer struct {
	status int
	header string // further lines, each with its CRLF
	body   string
	delay  time.Duration
}

const (
	role  = "my-role"
	keyID = "ASIASCRIPTED00000000"
)

// healthy answers as the real endpoint does, with IMDSv1 allowed.
func healthy(method, target string, _ textproto.MIMEHeader) answer {
	const list = "/latest/meta-data/iam/security-credentials/"
	switch {
	case method == "PUT" && target == "/latest/api/token":
		return answer{status: 200, header: "X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 21600\r\n", body: "scripted-token-0123456789"}
	case method == "GET" && target == list:
		return answer{status: 200, body: role}
	case method == "GET" && target == list+role:
		now := time.Now().UTC()
		return answer{status: 200, body: fmt.Sprintf(`{"Code":"Success","LastUpdated":%q,"Type":"AWS-HMAC","AccessKeyId":%q,"SecretAccessKey":"scripted-secret","Token":"scripted-session","Expiration":%q}`,
			now.Format(time.RFC3339), keyID, now.Add(time.Hour).Format(time.RFC3339))}
	}
	return answer{status: 404, body: "not found here"}
}

// serve answers every connection by the script until the listener is closed. It is not net/http,
// which refuses requests without Host, and so some of the clients that are tested here.
func serve(l net.Listener, script func(method, target string, h textproto.MIMEHeader) answer) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for r := textproto.NewReader(bufio.NewReader(c)); ; {
				head, err := r.ReadLine()
				if err != nil {
					return
				}
				h, err := r.ReadMIMEHeader()
				if err != nil {
					return
				}
				if n, err := strconv.ParseInt(h.Get("Content-Length"), 10, 64); err == nil {
					if _, err := io.CopyN(io.Discard, r.R, n); err != nil {
						return
					}
				}
				words := strings.Fields(head)
				if len(words) != 3 {
					return
				}
				a := script(words[0], words[1], h)
				time.Sleep(a.delay)
				if _, err := fmt.Fprintf(c, "HTTP/1.1 %d scripted\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n%s\r\n%s", a.status, len(a.body), a.header, a.body); err != nil {
					return
				}
			}
		}()
	}
}
